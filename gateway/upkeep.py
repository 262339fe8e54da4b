"""What every gateway does beside its calls: clears what has expired, and says whether Redis takes work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from streamflow.errors import BusyError, UnavailableError
from streamflow.rpc.server import RpcServer
from streamflow.telemetry import get_logger
from streamflow.transport.base import Transport

_log = get_logger(__name__)


async def keep_up(transports: Sequence[Transport], server: RpcServer, *, every_s: float) -> None:
    """Reaps, and turns readiness with the transports, until it is cancelled. They are over one Redis."""
    ready: bool | None = None
    while True:
        was, ready = ready, all(await asyncio.gather(*map(_reap, transports)))
        if ready is not was:
            _log.info("transport takes work" if ready else "transport takes no work")
        await server.set_ready(ready)
        await asyncio.sleep(every_s)


async def _reap(transport: Transport) -> bool:
    try:
        await transport.ping()
        await transport.reap()
    except UnavailableError as error:
        _log.debug("transport away", reason=str(error))
        return False
    except BusyError as error:
        # Full is not away: what is there can be read, and new requests are told when to come back.
        _log.warning("transport is full", reason=str(error))
    except Exception as error:
        # One thing that cannot be cleared must not end the gateway, and with it all others.
        _log.error("what has expired cannot be cleared", error=error)
    return True


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Waits for an event, so long at most; whether it came."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
