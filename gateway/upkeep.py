"""What every gateway does beside its calls: clears what has expired, and says whether Redis takes work."""

from __future__ import annotations

import asyncio

from streamflow.errors import UnavailableError
from streamflow.rpc.server import RpcServer
from streamflow.telemetry import get_logger
from streamflow.transport.base import Transport

_log = get_logger(__name__)


async def keep_up(transport: Transport, server: RpcServer, *, every_s: float) -> None:
    """Reaps, and turns readiness with the transport, until cancelled."""
    ready: bool | None = None
    while True:
        was, ready = ready, await _reap(transport)
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
    return True
