"""One GPU for a replica that sees several: the one with the least work, by leases that the replicas keep in Redis.

    with own_gpu(settings, Stage.DENOISE) as gpu:
        import torch        # sees this GPU alone

Replicas that are started together by Compose or by hand have no numbers by which to share the GPUs out. The choice is
made once, at the start: nobody moves later.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from streamflow.config import StageSettings, show_gpu, visible_gpus
from streamflow.errors import BusyError, InvalidRequestError, StreamFlowError, UnavailableError
from streamflow.gpus import WEIGHTS, Gpu, find, list_gpus, visible
from streamflow.telemetry import Told, get_logger
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Stage

RENEW_EVERY_S = 5.0
"""A lease lasts three times this: that long the GPU of a replica that was killed is kept for it."""

_LEAVE_S = 3.0

_log = get_logger(__name__)


@contextmanager
def own_gpu(
    settings: StageSettings,
    stage: Stage,
    *,
    listed: Callable[[], Sequence[Gpu]] = list_gpus,
    renew_every_s: float = RENEW_EVERY_S,
) -> Iterator[Gpu | None]:
    """Shows CUDA one GPU of this process's own; None where there is nothing to choose. To be entered before torch.

    Args:
        listed: gives the GPUs of this machine.

    Raises:
        SystemExit: with 2 for a GPU that is not there, or settings by which Redis cannot be asked; the log says why.
    """
    with _ending():
        gpus = _candidates(settings, listed)
    if not gpus:
        yield None
        return
    with _leased(gpus, settings, stage, renew_every_s) as gpu:
        show_gpu(gpu.uuid)
        _log.info("has a GPU", gpu=gpu.number, uuid=gpu.uuid, name=gpu.name, of=len(gpus))
        yield gpu


@contextmanager
def _ending() -> Iterator[None]:
    """Ends the process by what cannot be helped."""
    try:
        yield
    except StreamFlowError as error:
        _log.error("cannot run", reason=str(error))
        raise SystemExit(2 if isinstance(error, InvalidRequestError) else 1) from error


def _candidates(settings: StageSettings, listed: Callable[[], Sequence[Gpu]]) -> list[Gpu]:
    """Those to choose from, the preferred first; empty = there is no choice to make."""
    if settings.gpu == "none":
        return []
    if settings.gpu == "auto":
        # A device that was named is a choice already.
        gpus = visible(listed(), visible_gpus()) if settings.device in ("auto", "cuda") else []
        # What other programs and other deployments have there shows in its memory alone.
        return sorted(gpus, key=lambda gpu: gpu.used_bytes) if len(gpus) > 1 else []
    return [find(visible(listed(), visible_gpus()), settings.gpu)]


@contextmanager
def _leased(gpus: Sequence[Gpu], settings: StageSettings, stage: Stage, renew_every_s: float) -> Iterator[Gpu]:
    """Renewed by a thread, as loading a model keeps the others busy for minutes."""
    lease = _Lease([gpu.uuid for gpu in gpus], settings, stage, renew_every_s)
    thread = threading.Thread(target=lambda: asyncio.run(lease.keep()), name="GPU lease", daemon=True)
    thread.start()
    try:
        with _ending():
            # Where there is no choice, the lease only tells the others.
            gpu = gpus[0] if len(gpus) == 1 else find(gpus, lease.chosen.result())
        yield gpu
    finally:
        lease.leave()
        thread.join(_LEAVE_S)


class _Lease:
    """A replica's entry among the leases on GPUs.

    Attributes:
        chosen: the GPU's UUID, once Redis was reached.
    """

    def __init__(self, gpus: Sequence[str], settings: StageSettings, stage: Stage, renew_every_s: float) -> None:
        self.chosen: Future[str] = Future()
        self._gpus, self._settings, self._stage, self._every_s = gpus, settings, stage, renew_every_s
        # Who is started again after a crash, as containers are, is who it was, and takes up its own lease. On one host
        # no two listen on a port.
        of_process = f"{socket.gethostname()}:{settings.port}" if settings.port else secrets.token_hex(4)
        self._holder = f"{stage.service}-{of_process}"
        self._leaving, self._told = asyncio.Event(), Told()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def keep(self) -> None:
        """Takes the lease and renews it until `leave`."""
        self._loop = asyncio.get_running_loop()
        try:
            transport = RedisTransport.of(self._settings, revision="")
            try:
                await self._hold(transport)
            finally:
                await transport.close()
        except BaseException as error:
            # Whoever waits for it must not wait for ever.
            if not self.chosen.done():
                self.chosen.set_exception(error)
            # Told by who waits, or by who needs Redis next.
            if not isinstance(error, StreamFlowError):
                raise

    async def _hold(self, transport: RedisTransport) -> None:
        while not self._leaving.is_set():
            await self._renew(transport)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), self._every_s)
        with suppress(UnavailableError, BusyError):
            await transport.free_gpu(self._holder)

    async def _renew(self, transport: RedisTransport) -> None:
        # After a lapse, too, it is where it was: what it was shown at the start is what it uses.
        gpus = [self.chosen.result()] if self.chosen.done() else self._gpus
        try:
            uuid = await transport.lease_gpu(self._holder, gpus, weight=WEIGHTS[self._stage], lease_s=3 * self._every_s)
        except (UnavailableError, BusyError) as error:
            # Without Redis there is no work either.
            if self._told.is_news(error):
                _log.warning("no lease on a GPU", reason=str(error))
            return
        self._told.over()
        if not self.chosen.done():
            self.chosen.set_result(uuid)

    def leave(self) -> None:
        """From any thread; what cannot be given back lapses."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._leaving.set)
