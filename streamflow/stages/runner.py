"""The thread that ticks an engine, with asyncio on its outside."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Self

import numpy as np

from streamflow.batching.engine import Engine, Preview, Progress, TickReport
from streamflow.batching.slots import Image
from streamflow.errors import NotFoundError, StreamFlowError, UnavailableError
from streamflow.flow.programs import Op
from streamflow.types import SlotState

KEPT_TICKS = 4096

_JOIN_S = 2.0
_LOOK_S = 1.0

_LEAVING = "this denoiser is shutting down; call another replica"


class EngineEndedError(UnavailableError):
    """The engine's thread ended, or hangs, while the image was in its slot: the image may be why."""


class SuspendedError(UnavailableError):
    """The image was taken out of its slot unfinished; with `state` as its `resume` another denoiser goes on."""

    def __init__(self, state: SlotState) -> None:
        super().__init__(_LEAVING)
        self.state = state


@dataclass(frozen=True, slots=True)
class TickRecord:
    """One tick for those who look at the engine.

    Attributes:
        timesteps: what each slot's network call was fed.
        seconds: of the tick; `network_s` of them in steps: network, guidance and update of the latents.
    """

    timesteps: tuple[float, ...]
    rows: int
    padded_rows: int
    seconds: float
    network_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Watcher:
    """Whom to tell about one image; used on the event loop only."""

    latents: asyncio.Future[np.ndarray]
    on_progress: Callable[[Progress], None] | None
    on_preview: Callable[[Preview], None] | None
    on_wait: Callable[[], None] | None
    waiting: bool = True
    place: tuple[int, int, float] | None = None


class EngineRunner:
    """Runs images on an engine from asyncio.

    One thread owns the engine: commands reach it through an inbox, reports come back through the event loop, so no
    state is shared. The thread blocks on its inbox only when nothing is under way. Use as an async context manager.

    Args:
        steps_s: seconds that the engine's steps took so far.

    Attributes:
        on_tick: told of every tick, on the event loop.
        ticks: the last records, newest last.
        counters: monotonic counts: ticks, mixed ticks (several timesteps at once), network evaluations over all images,
            rows, padded rows, images, failures.
    """

    def __init__(self, engine: Engine, *, steps_s: Callable[[], float] = lambda: 0.0) -> None:
        self.on_tick: Callable[[TickRecord], None] | None = None
        self.ticks: deque[TickRecord] = deque(maxlen=KEPT_TICKS)
        self.counters = dict.fromkeys(
            (
                "ticks_total",
                "mixed_ticks_total",
                "evaluations_total",
                "rows_total",
                "padded_rows_total",
                "images_total",
                "failed_total",
            ),
            0,
        )
        self._engine, self._steps_s = engine, steps_s
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._watchers: dict[Hashable, _Watcher] = {}
        self._changes: set[asyncio.Future[None]] = set()
        self._slots = asyncio.Semaphore(engine.capacity)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._error: BaseException | None = None
        self._suspended = False
        self._ended = asyncio.Event()
        self._tick_began_s: float | None = None
        # Seconds, and since when there are more of them; set as one, as other threads read it.
        self._waited: tuple[float, float | None] = 0.0, None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Ends the thread after its tick; images under way are cancelled."""
        self._inbox.put(None)
        # A thread that hangs in a network call goes with its process.
        await asyncio.to_thread(self._thread.join, _JOIN_S)
        for watcher in self._watchers.values():
            watcher.latents.cancel()
        for change in self._changes:
            change.cancel()

    async def watch(self, *, hung_after_s: float = inf) -> None:
        """Returns never; a process whose engine has ended or hangs should end too, so that it is started anew.

        Args:
            hung_after_s: what a tick may take.

        Raises:
            UnavailableError: the engine's thread has ended, or it hangs.
        """
        while not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK_S, hung_after_s / 4)):
                    await self._ended.wait()
            # The thread's own; it may be set anew at any time.
            began_s = self._tick_began_s
            if began_s is not None and time.perf_counter() - began_s > hung_after_s:
                self._break(TimeoutError(f"a tick has not ended after {hung_after_s:g} s"))
        raise UnavailableError("the denoiser's engine has ended; restart the denoiser") from self._error

    def place(self, handle: Hashable) -> tuple[int, int, float] | None:
        """Step, of how many, and the timestep of it, after the image's last tick; None before its first one."""
        watcher = self._watchers.get(handle)
        return watcher.place if watcher else None

    @property
    def waited_s(self) -> float:
        """Seconds of the engine's thread between ticks, up to now; for any thread."""
        now_s = time.perf_counter()
        seconds, since_s = self._waited
        return seconds if since_s is None else seconds + max(0.0, now_s - since_s)

    @property
    def in_use(self) -> int:
        """Images that hold or wait for a slot."""
        return len(self._watchers)

    async def run(
        self,
        image: Image,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Runs one image and returns its latents, float32 [C, H, W]; waits while all slots are in use.

        Cancelling the caller frees the slot before the next tick. The callbacks run on the event loop; `on_wait` comes
        with every tick of the others until this image has a slot.

        Raises:
            GenerationError: the network failed or the latents are not finite.
            SuspendedError: `suspend` was called.
            UnavailableError: so it was before this image had a slot, or the engine's thread has ended.
        """
        watcher = _Watcher(self._loop.create_future(), on_progress, on_preview, on_wait)
        if image.handle in self._watchers:
            raise ValueError(f"image {image.handle!r} is under way already")
        self._watchers[image.handle] = watcher
        try:
            async with self._slots:
                watcher.waiting = False
                return await self._run_in_slot(image, watcher)
        finally:
            del self._watchers[image.handle]

    async def _run_in_slot(self, image: Image, watcher: _Watcher) -> np.ndarray:
        if self._error is not None:
            raise UnavailableError("the denoiser's engine has ended; restart the denoiser") from self._error
        if self._suspended:
            raise UnavailableError(_LEAVING)
        self._inbox.put(lambda: self._admit(image))
        try:
            return await watcher.latents
        except asyncio.CancelledError:
            # Whoever gets the slot next is admitted behind this command.
            self._inbox.put(lambda: self._engine.cancel(image.handle))
            raise

    def suspend(self) -> None:
        """Ends every image after the current tick with SuspendedError, and takes no more."""
        self._suspended = True
        self._inbox.put(lambda: self._tell(self._suspend, self._engine.suspend()))

    async def change(self, handle: Hashable, make: Callable[[Op], Image], *, restart: bool) -> None:
        """Exchanges an image between two ticks; see Engine.change.

        Args:
            make: the new image, from the op that the old one would run next; called in the engine's thread.

        Raises:
            NotFoundError: the image is not in its slot yet or any more.
            InvalidRequestError, ValueError: of `make`, or the new image does not fit.
            UnavailableError: the engine's thread has ended.
        """
        if self._error is not None:
            raise UnavailableError("the denoiser's engine has ended; restart the denoiser") from self._error
        done: asyncio.Future[None] = self._loop.create_future()
        self._changes.add(done)
        self._inbox.put(lambda: self._tell(_settle, done, self._changing(handle, make, restart)))
        try:
            await done
        finally:
            self._changes.discard(done)

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            waited_s, ended_s = 0.0, time.perf_counter()
            self._waited = waited_s, ended_s
            while self._obey():
                self._tick_began_s = began_s = time.perf_counter()
                waited_s, steps_s = waited_s + began_s - ended_s, self._steps_s()
                self._waited = waited_s, None
                report = self._engine.tick()
                self._tick_began_s, ended_s = None, time.perf_counter()
                self._waited = waited_s, ended_s
                record = _record(report, ended_s - began_s, self._steps_s() - steps_s)
                self._tell(self._deliver, report, record)
            self._engine.clear()
        except BaseException as error:
            self._tell(self._break, error)
            raise

    def _obey(self) -> bool:
        """Carries out what is in the inbox, waiting for it when idle; False at the end."""
        while True:
            if not len(self._engine):
                self._engine.check_integrity()
            try:
                command = self._inbox.get(block=not len(self._engine))
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _admit(self, image: Image) -> None:
        try:
            self._engine.admit(image)
        except (ValueError, RuntimeError) as error:
            self._tell(self._fail, image.handle, error)

    def _changing(self, handle: Hashable, make: Callable[[Op], Image], restart: bool) -> Exception | None:
        try:
            self._engine.change(handle, lambda _, op: make(op), restart=restart)
        except KeyError:
            return NotFoundError(f"image {handle!r} is not being denoised")
        except (ValueError, RuntimeError) as error:
            return error
        return None

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)

    # -- the event loop ----------------------------------------------------------------------------------------------

    def _deliver(self, report: TickReport, record: TickRecord) -> None:
        self._count(report, record)
        for progress, timestep in zip(report.progress, report.timesteps, strict=True):
            watcher = self._watchers.get(progress.handle)
            if watcher is not None:
                watcher.place = progress.step, progress.steps, timestep
                if watcher.on_progress is not None:
                    watcher.on_progress(progress)
        for preview in report.previews:
            watcher = self._watchers.get(preview.handle)
            if watcher is not None and watcher.on_preview is not None:
                watcher.on_preview(preview)
        for watcher in self._watchers.values():
            if watcher.waiting and watcher.on_wait is not None:
                watcher.on_wait()
        for handle, latents in report.retired.items():
            watcher = self._watchers.get(handle)
            if watcher is not None and not watcher.latents.done():
                watcher.latents.set_result(latents)
        for handle, error in report.failed.items():
            self._fail(handle, error)

    def _count(self, report: TickReport, record: TickRecord) -> None:
        self.ticks.append(record)
        if self.on_tick is not None:
            self.on_tick(record)
        self.counters["ticks_total"] += 1
        self.counters["mixed_ticks_total"] += len(set(report.timesteps)) > 1
        self.counters["evaluations_total"] += len(report.timesteps)
        self.counters["rows_total"] += report.rows
        self.counters["padded_rows_total"] += report.padded_rows
        self.counters["images_total"] += len(report.retired)
        self.counters["failed_total"] += len(report.failed)

    def _suspend(self, states: dict[Hashable, SlotState]) -> None:
        for handle, state in states.items():
            self._fail(handle, SuspendedError(state))

    def _fail(self, handle: Hashable, error: StreamFlowError | Exception) -> None:
        watcher = self._watchers.get(handle)
        if watcher is not None and not watcher.latents.done():
            watcher.latents.set_exception(error)

    def _break(self, error: BaseException) -> None:
        self._error = error
        self._ended.set()
        reason = f"the denoiser's engine ended: {type(error).__name__}: {error}"
        for handle, watcher in list(self._watchers.items()):
            self._fail(handle, UnavailableError(reason) if watcher.waiting else EngineEndedError(reason))
        for change in self._changes:
            _settle(change, UnavailableError(reason))


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if not future.done():
        future.set_result(None) if error is None else future.set_exception(error)


def _record(report: TickReport, seconds: float, network_s: float) -> TickRecord:
    return TickRecord(tuple(report.timesteps), report.rows, report.padded_rows, seconds, network_s)
