"""What every gateway does beside its calls: clears what has expired, and says whether Redis takes work."""

from __future__ import annotations

import asyncio

from gateway.models import Models, Served
from streamflow.errors import BusyError, UnavailableError
from streamflow.rpc.server import RpcServer
from streamflow.telemetry import Told, get_logger

_log = get_logger(__name__)


async def keep_up(models: Models, server: RpcServer, *, every_s: float) -> None:
    """Reaps, and turns readiness with the transports, until it is cancelled. They are over one Redis."""
    fullness = [Told() for _ in models]
    said: str | None = None
    while True:
        reasons = await asyncio.gather(*map(_reap, models, fullness))
        reason = next(filter(None, reasons), "")
        if reason != said and reason:
            _log.warning("transport takes no work", reason=reason)
        elif reason != said:
            _log.info("transport takes work")
        said = reason
        await server.set_ready(not reason)
        await asyncio.sleep(every_s)


async def _reap(served: Served, fullness: Told) -> str:
    """Why the model's transport takes no work; empty where it does."""
    transport, model = served.transport, served.card.name
    try:
        await transport.ping()
        await transport.reap()
        for job in await transport.take_ended():
            _log.info("ended", job=job.id, model=model, state=job.state.value, took_s=round(job.took_s, 3))
        fullness.over()
    except UnavailableError as error:
        return str(error)
    except BusyError as error:
        # Full is not away: what is there can be read, and new requests are told when to come back.
        if fullness.is_news(error):
            _log.warning("transport is full", reason=str(error))
    except Exception as error:
        # One thing that cannot be cleared must not end the gateway, and with it all others.
        _log.error("what has expired cannot be cleared", error=error)
    return ""
