"""The loop that every stage runs: read what there is room for, work on it, hand it on; give up nothing silently."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from streamflow.errors import BusyError, DeadlineError, JobCancelledError, StreamFlowError, UnavailableError
from streamflow.telemetry.logs import Told
from streamflow.transport.backoff import Backoff
from streamflow.transport.base import Entry, Transport
from streamflow.transport.handling import (
    Advance,
    EntryContext,
    Finish,
    Handler,
    Outcome,
    OutOfTimeError,
    WorkRecord,
)
from streamflow.transport.pace import Pace
from streamflow.types import Failure, JobState, Stage, WorkerInfo

log = logging.getLogger(__name__)

_BLOCK_S = 1.0
_MISSED = 7
# Less than what the gRPC server and the supervisors leave after the grace period.
_SUSPEND_S = 1.5
_TRANSIENT = (UnavailableError, BusyError)
# Outcomes of work that was done; the others are of attempts.
_MADE = frozenset({"advanced", "finished", "failed"})
# Told as 0 before the first time: a rate needs a value then.
_COUNTED = ("ended_total", "late_total", "handed_back_total", "lost_total", "cancelled_total")


@dataclass(frozen=True, slots=True)
class _HandBack:
    """Not now, or not by us: the entry goes to whoever reads next."""

    count_attempt: bool


@dataclass(frozen=True, slots=True)
class _End:
    """The job ended while we worked on it."""

    state: JobState
    failure: Failure


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the entries that were in hand when the drain began."""

    finished: int
    handed_back: int


class StageWorker:
    """Runs a stage's handler on the entries of its stream.

    What a handler raises decides: a StreamFlowError fails the job with its code, except that UnavailableError and
    BusyError hand the entry back; DeadlineError and JobCancelledError end the job so. Any other exception is logged,
    and the entry handed back with its attempt counted, until the transport gives it up.

    Args:
        transport: carries the work.
        stage: whose stream to read.
        handle: works on one entry; called concurrently, at most `capacity` at once, and cancelled when the entry is
            no longer ours or its job ended.
        info: what the registry shall say of this worker; its id, `slots_in_use` and `draining` are filled in here.
        capacity: entries to hold at once.
        progress_timeout_s: a handler that reports no progress for so long is stopped, and its attempt counted.
        register_every_s: the registry shows what was so then; its lease is longer by some missed times.
        on_worked: told of each entry when it leaves this worker, by whatever way.
        suspend: called a step before a drain's grace period ends: the handlers shall return after their step, with
            outcomes from which others can go on. What they leave undone is handed back as it was.
    """

    def __init__(
        self,
        transport: Transport,
        stage: Stage,
        handle: Handler,
        *,
        info: Callable[[], WorkerInfo],
        capacity: int,
        progress_timeout_s: float = 60.0,
        register_every_s: float = 2.0,
        suspend: Callable[[], None] | None = None,
        on_worked: Callable[[WorkRecord], None] | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: got {capacity}; allowed: 1 or more")
        self._transport = transport
        self._stage = stage
        self._handle = handle
        self._info = info
        self._worker_id = info().worker_id
        self._capacity = capacity
        self._progress_timeout_s = progress_timeout_s
        self._register_every_s = register_every_s
        self._suspend, self._on_worked = suspend, on_worked
        self._pace = Pace()
        self._in_hand: dict[str, tuple[EntryContext, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        self._draining = asyncio.Event()
        self._stopped = asyncio.Event()
        self._leave_at = inf
        self._lent = 0
        self._read_backoff, self._work_backoff = Backoff(), Backoff()
        self._no_heartbeat = Told()
        self.counters = Counter(dict.fromkeys(_COUNTED, 0))

    def __repr__(self) -> str:
        state = "stopped" if self._stopped.is_set() else "draining" if self.draining else "reading"
        return f"StageWorker({self._stage.service} {self._worker_id}, {state}, {self.in_hand}/{self._capacity} in hand)"

    @property
    def in_hand(self) -> int:
        return len(self._in_hand)

    @property
    def draining(self) -> bool:
        return self._draining.is_set()

    def info(self) -> WorkerInfo:
        """The worker as the registry shows it."""
        image_ms = 1000 * self._pace.image_s
        info = self._info()
        return replace(
            info,
            slots_in_use=self.in_hand,
            draining=self.draining,
            image_ms=image_ms,
            counters={**info.counters, **self.counters},
        )

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Work that is not from the stream takes a place meanwhile: no entry is read for it."""
        self._lent += 1
        try:
            yield
        finally:
            self._lent -= 1
            self._changed.set()

    async def run(self) -> None:
        """Works until `drain` or cancellation; either way nothing stays behind in this worker's name."""
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(self._keep_registered(), name=f"register {self._worker_id}"),
                    tasks.create_task(self._keep_leases(), name=f"heartbeat {self._worker_id}"),
                    tasks.create_task(self._drop_ended(), name=f"ended jobs {self._worker_id}"),
                ]
                await self._read_until_drained(tasks)
                await self._wait_for_the_rest()
                for task in (*background, *(task for _, task in self._in_hand.values())):
                    task.cancel()
        finally:
            await self._leave()
            self._stopped.set()

    async def drain(self, grace_s: float) -> DrainReport:
        """Stops reading, waits up to `grace_s` for what is in hand, hands the rest back; `run` ends.

        Of several drains the one that ends first counts.
        """
        before = self.counters.copy()
        self._leave_at = min(self._leave_at, asyncio.get_running_loop().time() + grace_s)
        self._draining.set()
        self._changed.set()
        await self._stopped.wait()
        since = self.counters - before
        return DrainReport(since["ended_total"], since["handed_back_total"])

    # -- reading -----------------------------------------------------------------------------------------------------

    async def _read_until_drained(self, tasks: asyncio.TaskGroup) -> None:
        told = Told()
        while not self.draining:
            # Cleared before the look, so that a change after it is not missed.
            self._changed.clear()
            free = self._capacity - self._lent - len(self._in_hand)
            if free <= 0:
                await self._changed.wait()
                continue
            await self._pause(max(self._read_backoff.next_s(), self._work_backoff.next_s()))
            try:
                entries = await self._transport.read(self._stage, self._worker_id, free, block_s=_BLOCK_S)
                if self.draining:
                    await self._hand_back(entries)
                    return
            except _TRANSIENT as error:
                self._read_backoff.failed()
                if told.is_news(error):
                    log.warning("%s: nothing can be read: %s", self._stage.service, error)
            except Exception:
                # What others wrote into the store must not end the stage.
                self._read_backoff.failed()
                log.exception("%s: what was read cannot be used", self._stage.service)
            else:
                self._read_backoff.succeeded()
                told.over()
                for entry in entries:
                    self._start(tasks, entry)

    def _start(self, tasks: asyncio.TaskGroup, entry: Entry) -> None:
        context = EntryContext(entry, progress_timeout_s=self._progress_timeout_s)
        task = tasks.create_task(self._work(context), name=f"{self._stage} {entry.ref} attempt {entry.attempt}")
        self._in_hand[entry.id] = context, task
        self._pace.began(context)
        task.add_done_callback(lambda ended: self._put_down(context, ended))

    def _put_down(self, context: EntryContext, ended: asyncio.Task[None]) -> None:
        self._pace.left(context)
        # What was handed back may have been taken again before its first task was seen to end.
        if self._in_hand.get(context.entry.id, (None, None))[1] is ended:
            del self._in_hand[context.entry.id]
        self._changed.set()

    # -- one entry ---------------------------------------------------------------------------------------------------

    async def _work(self, context: EntryContext) -> None:
        told = "dropped"
        try:
            told = await self._attempt(context)
        finally:
            self._tell(context.record(told))

    async def _attempt(self, context: EntryContext) -> str:
        """What became of it, in the words of WorkRecord."""
        outcome: Outcome | _HandBack | _End = await self._outcome(context)
        # However long the store is away now, this image costs no more.
        self._pace.left(context)
        try:
            in_time = await self._settle(context, outcome)
        except Exception:
            log.exception("%s: the outcome of %s cannot be stored", self._stage.service, context.entry.ref)
            outcome = _HandBack(count_attempt=True)
            in_time = await self._settle(context, outcome)
        return self._told(outcome) if in_time else "late"

    def _told(self, outcome: Outcome | _HandBack | _End) -> str:
        match outcome:
            case Advance(to) if to is self._stage:
                return "handed_back"  # with what was done of it
            case Advance():
                return "advanced"
            case Finish(Failure()):
                return "failed"
            case Finish():
                return "finished"
            case _End(state):
                return state.value
            case _HandBack():
                return "handed_back"

    def _tell(self, record: WorkRecord) -> None:
        if record.outcome in _MADE:
            self._pace.ended()
        if self._on_worked is not None:
            try:
                self._on_worked(record)
            except Exception:
                # Whoever only watches must not stop the work.
                log.exception("%s: what became of %s cannot be told", self._stage.service, record.entry.ref)

    async def _outcome(self, context: EntryContext) -> Outcome | _HandBack | _End:
        entry, service = context.entry, self._stage.service
        try:
            return await context.run(self._handle)
        except OutOfTimeError:
            if context.past_deadline:
                return _End(JobState.DEADLINE, Failure(DeadlineError.code, "the deadline passed", service))
            log.error("%s: no progress on %s for %.1f s", service, entry.ref, self._progress_timeout_s)
            return _HandBack(count_attempt=True)
        except _TRANSIENT as error:
            log.warning("%s: %s is handed back: %s", service, entry.ref, error)
            return _HandBack(count_attempt=False)
        except DeadlineError as error:
            return _End(JobState.DEADLINE, Failure(error.code, str(error), service))
        except JobCancelledError as error:
            return _End(JobState.CANCELLED, Failure(error.code, str(error), service))
        except StreamFlowError as error:
            return Finish(Failure(error.code, str(error), service))
        except Exception:
            log.exception("%s: attempt %d on %s failed", service, entry.attempt, entry.ref)
            return _HandBack(count_attempt=True)

    async def _settle(self, context: EntryContext, outcome: Outcome | _HandBack | _End) -> bool:
        """Stores an outcome, however long Redis is away: the work is done, and the lease is kept meanwhile.

        Returns False when it came too late.
        """
        entry, backoff, told = context.entry, Backoff(), Told()
        if isinstance(outcome, _HandBack):
            # Else this worker would take it again at once, and what fails for a moment fails every attempt.
            self._work_backoff.failed()
        while True:
            elsewhere = context.elsewhere
            try:
                return await self._store(entry, outcome)
            except _TRANSIENT as error:
                if elsewhere:
                    # Nobody waits for it any more, and it may never be taken.
                    self._transport.put_down([entry])
                    self.counters["late_total"] += 1
                    return False
                if told.is_news(error):
                    log.warning("%s: the outcome of %s waits: %s", self._stage.service, entry.ref, error)
                backoff.failed()
                await asyncio.sleep(backoff.next_s())

    async def _store(self, entry: Entry, outcome: Outcome | _HandBack | _End) -> bool:
        in_time = True
        match outcome:
            case Advance(to, payload, warnings):
                in_time = await self._transport.advance(entry, to, payload, warnings=warnings)
                if to is self._stage:
                    self.counters["handed_back_total"] += in_time
                    return in_time
            case Finish(result):
                in_time = await self._transport.finish(entry, result)
            case _End(state, failure):
                in_time = await self._transport.cancel(entry.ref.job_id, state=state, failure=failure)
            case _HandBack(count_attempt):
                await self._hand_back([entry], count_attempt=count_attempt)
                return True
        self._work_backoff.succeeded()
        self.counters["ended_total" if in_time else "late_total"] += 1
        return in_time

    async def _hand_back(self, entries: Sequence[Entry] | None, *, count_attempt: bool = False) -> None:
        count = await self._transport.hand_back(self._stage, self._worker_id, entries, count_attempt=count_attempt)
        self.counters["handed_back_total"] += count

    # -- beside the work ---------------------------------------------------------------------------------------------

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(self._transport.lease_s / 4)
            await self._beat(dict(self._in_hand))

    async def _drop_ended(self) -> None:
        """Beats at once for the entries of a job that ended, which is when their work is of no more use."""
        backoff = Backoff()
        while True:
            try:
                async with self._transport.ended_jobs() as ended:
                    async for job_id in ended:
                        backoff.succeeded()
                        held = {key: held for key, held in self._in_hand.items() if held[0].entry.ref.job_id == job_id}
                        await self._beat(held)
            except _TRANSIENT as error:
                # The regular beats find out as well, only later.
                log.debug("%s: not told of ended jobs: %s", self._stage.service, error)
                backoff.failed()
                await asyncio.sleep(backoff.next_s())

    async def _beat(self, held: Mapping[str, tuple[EntryContext, asyncio.Task[None]]]) -> None:
        """Renews the leases of these entries, and lets go of those that are no longer ours to work on."""
        if not held:
            return
        try:
            entries = [context.entry for context, _ in held.values()]
            beat = await self._transport.heartbeat(self._stage, self._worker_id, entries)
        except _TRANSIENT as error:
            if self._no_heartbeat.is_news(error):
                log.warning("%s: no heartbeat: %s", self._stage.service, error)
            return
        self._no_heartbeat.over()
        for counter, entry_ids in (("lost_total", beat.lost), ("cancelled_total", beat.cancelled)):
            for entry_id in entry_ids:
                # Not the task that took the same entry anew since the beat was sent.
                context, task = held[entry_id]
                if not context.at_work:
                    # Its own move may be why, and tells whether it came in time.
                    context.elsewhere = True
                elif not task.cancelling():
                    self._transport.put_down([context.entry])
                    task.cancel()
                    self.counters[counter] += 1

    async def _keep_registered(self) -> None:
        told = Told()
        while True:
            try:
                await self._transport.register(self.info(), lease_s=_MISSED * self._register_every_s)
            except _TRANSIENT as error:
                if told.is_news(error):
                    log.warning("%s: not registered: %s", self._stage.service, error)
            else:
                told.over()
            await asyncio.sleep(self._register_every_s)

    async def _pause(self, seconds: float) -> None:
        """Ends early when the drain begins."""
        if seconds:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._draining.wait()

    async def _wait_for_the_rest(self) -> None:
        if self._suspend is None:
            await self._wait_until_empty(lambda: self._leave_at)
            return
        step_s = max((context.step_s for context, _ in self._in_hand.values()), default=0.0)
        await self._wait_until_empty(lambda: self._leave_at - step_s)
        if self._in_hand:
            self._suspend()
            until = max(self._leave_at, asyncio.get_running_loop().time() + step_s) + _SUSPEND_S
            await self._wait_until_empty(lambda: until)

    async def _wait_until_empty(self, until: Callable[[], float]) -> None:
        while self._in_hand and asyncio.get_running_loop().time() < until():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until()):
                    await self._changed.wait()

    async def _leave(self) -> None:
        try:
            # Whoever leaves without having been asked may have been ended by what it holds.
            await self._hand_back(None, count_attempt=not self.draining)
            await self._transport.unregister(self._worker_id)
        except _TRANSIENT as error:
            log.warning("%s: others take over when the leases lapse: %s", self._stage.service, error)
