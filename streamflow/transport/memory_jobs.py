"""The state of the memory transport: jobs, streams with leases, and the moves between them.

The same moves as `scripts/*.lua`, in the same words; here one event loop makes them atomic.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from streamflow.transport.base import DeadLetter, EndedJob, Entry, ImageRef, JobPlace, JobView, NewJob, Payload, Queue
from streamflow.transport.estimates import Measured, Sums, class_of
from streamflow.transport.policy import Policy
from streamflow.types import Failure, JobState, Stage, WorkerInfo

WAITING = "waiting"
# Owners of what was handed back: after a failure, and for no fault of anybody's.
NOBODY, UNTRIED = "nobody", "untried"
_MAX_ENDS = 1000


@dataclass(slots=True)
class Job:
    new: NewJob
    admitted_at_s: float
    deadline_at_s: float
    watch_lease_s: float | None
    watch_until_s: float | None
    places: list[str]
    state: JobState = JobState.QUEUED
    finished_at_s: float | None = None
    delivered: bool = False
    failure: Failure | None = None
    warnings: dict[str, None] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)
    results_until_s: float | None = None
    released: dict[int, tuple[float, int]] = field(default_factory=dict)
    estimate_s: float | None = None

    @property
    def reserved_bytes(self) -> int:
        share = self.new.reserved_bytes // self.new.num_images
        return share * len(self.live()) + sum(map(len, self.results.values()))

    def live(self) -> list[int]:
        """The images that have not ended."""
        return [index for index, place in enumerate(self.places) if place == WAITING or ":" in place]

    @property
    def place(self) -> JobPlace:
        return JobPlace(self.admitted_at_s, self.new.id)

    def view(self) -> JobView:
        return JobView(
            id=self.new.id,
            state=self.state,
            spec=self.new.spec,
            tenant=self.new.tenant,
            images=tuple(place.split(":")[0] for place in self.places),
            admitted_at_s=self.admitted_at_s,
            deadline_at_s=self.deadline_at_s,
            finished_at_s=self.finished_at_s,
            failure=self.failure,
            warnings=tuple(self.warnings),
            estimate_s=self.estimate_s,
        )


@dataclass(slots=True)
class StreamEntry:
    """An entry on a stream; pending when it has an owner, free to claim when `delivered_at_s` is a lease ago."""

    id: str
    ref: ImageRef
    payload: Payload
    enqueued_at_s: float
    owner: str | None = None
    delivered_at_s: float = 0.0
    deliveries: int = 0


class State:
    """Everything a deployment knows.

    Args:
        wake: called with the id of each job that changed.
        ended: called with the id of each job that ends while it is being worked on.
    """

    def __init__(
        self, policy: Policy, clock: Callable[[], float], *, wake: Callable[[str], None], ended: Callable[[str], None]
    ) -> None:
        self.policy = policy
        self.clock = clock
        self.wake, self.ended = wake, ended
        self.jobs: dict[str, Job] = {}
        self.listed: defaultdict[str, list[JobPlace]] = defaultdict(list)
        self.waiting: dict[ImageRef, float] = {}
        self.streams: dict[Stage, dict[str, StreamEntry]] = {stage: {} for stage in Stage}
        self.workers: dict[str, tuple[WorkerInfo, float]] = {}
        self.dead: list[DeadLetter] = []
        self.measured = Measured(policy.memory)
        self.totals: Counter[str] = Counter()
        self.ends: deque[EndedJob] = deque(maxlen=_MAX_ENDS)
        self.clocks: defaultdict[str, float] = defaultdict(float)
        self.paced: defaultdict[str, float] = defaultdict(float)
        # Which worker empties its hands for a last attempt, and until when it is believed.
        self._cleared: dict[Stage, tuple[str, float]] = {}
        self._entry_ids = itertools.count(1)

    def queues(self) -> tuple[Queue, ...]:
        """Where images are, by priority; see overview.lua."""
        now_s, since = self.clock(), defaultdict[tuple[str, int], list[float]](list)
        for ref in self.waiting:
            job = self.jobs[ref.job_id]
            since[WAITING, job.new.priority].append(job.admitted_at_s)
        for stage, entries in self.streams.items():
            for entry in entries.values():
                since[stage.value, self.jobs[entry.ref.job_id].new.priority].append(entry.enqueued_at_s)
        return tuple(Queue(*key, len(times), max(0.0, now_s - min(times))) for key, times in since.items())

    def queue(self) -> list[ImageRef]:
        """Waiting images in the order in which they will be released."""
        return sorted(self.waiting, key=self.waiting.__getitem__)

    def under_way(self) -> int:
        return sum(len(entries) for entries in self.streams.values())

    def open_jobs(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.state.terminal]

    def num_slots(self) -> float:
        """Of the live denoisers; half of the least window while there are none."""
        now_s = self.clock()
        slots = sum(
            worker.slots
            for worker, lapses_s in self.workers.values()
            if worker.stage is Stage.DENOISE and not worker.draining and lapses_s > now_s
        )
        return slots or self.policy.min_window / 2

    def look_after_measuring(self) -> None:
        """What waits for a stage in which nobody is measures nothing."""
        now_s = self.clock()
        live = [worker for worker, lapses_s in self.workers.values() if lapses_s > now_s and not worker.draining]
        if {worker.stage for worker in live} != set(Stage):
            self.measured.steady_since_s = self.measured.last_done_s = now_s

    def estimate_s(self, ahead: float, work: float, images: int) -> float | None:
        """How long the last of some images of one job will take, with so much work waiting before the first."""
        return self.estimate(ahead, work, images)[0]

    def estimate(self, ahead: float, work: float, images: int) -> tuple[float | None, bool]:
        """`estimate_s`, and whether that is measured and not old."""
        window, under_way = 2 * self.num_slots(), self.under_way()
        image_s, at_s = self.measured.image_s(work, window if ahead else min(window, under_way + images))
        if image_s is None:
            return None, False
        waiting = images - 1 if ahead else under_way + images - window
        fresh = self.clock() - at_s < self.policy.fresh_s
        return self._queue_s(ahead + work * max(0, waiting)) + image_s, fresh

    def alone_s(self, work: float, images: int) -> float:
        """How long they would take if nobody else were there."""
        window = 2 * self.num_slots()
        image_s, _ = self.measured.image_s(work, min(window, images))
        return self._queue_s(work * max(0, images - window)) + (image_s or 0.0)

    def _queue_s(self, work: float) -> float:
        """How long work waits for a server whose slots are all in use."""
        return self.measured.slot_seconds(work) / self.num_slots()

    def work_before(self, rank: int) -> float:
        """What images in the queue before this place cost, if all cost the same."""
        if not self.waiting:
            return 0.0
        return sum(self.jobs[ref.job_id].new.work for ref in self.waiting) * rank / len(self.waiting)

    def is_at(self, entry: Entry | StreamEntry, stage: Stage) -> bool:
        job = self.jobs.get(entry.ref.job_id)
        return job is not None and job.places[entry.ref.index] == f"{stage}:{entry.id}"

    def enqueue(self, ref: ImageRef, stage: Stage, payload: Payload) -> None:
        entry = StreamEntry(str(next(self._entry_ids)), ref, dict(payload), self.clock())
        self.streams[stage][entry.id] = entry
        self.jobs[ref.job_id].places[ref.index] = f"{stage}:{entry.id}"

    def release(self) -> None:
        """Lets waiting images into the stages while fewer than a window are under way."""
        if not self.under_way():
            self.measured.last_done_s = self.clock()
        slots = self.num_slots()
        for ref in self.queue()[: max(0, int(2 * slots) - self.under_way())]:
            del self.waiting[ref]
            if self.under_way() + 1 == slots:
                self.measured.full_since_s = self.clock()
            self.enqueue(ref, Stage.ENCODE, {})
            job = self.jobs[ref.job_id]
            job.state, job.released[ref.index] = JobState.RUNNING, (self.clock(), self.under_way())
            self.wake(ref.job_id)

    def end_image(self, ref: ImageRef, state: str) -> None:
        """Takes an image out of wherever it is."""
        places = self.jobs[ref.job_id].places
        stage, _, entry_id = places[ref.index].partition(":")
        if entry_id:
            del self.streams[Stage(stage)][entry_id]
        self.waiting.pop(ref, None)
        places[ref.index] = state
        self.totals[f"images:{state}"] += 1

    def end_job(self, job: Job, state: JobState, rest: str, failure: Failure | None) -> None:
        if any(":" in place for place in job.places):
            self.ended(job.new.id)
        for index in job.live():
            self.end_image(ImageRef(job.new.id, index), rest)
        job.state, job.failure, job.finished_at_s = state, failure, self.clock()
        self.totals[f"ended:{state}"] += 1
        self.ends.append(EndedJob(job.new.id, state, job.finished_at_s - job.admitted_at_s))
        job.results_until_s = job.finished_at_s + self.policy.result_s
        self.wake(job.new.id)
        self.release()

    def end_late(self, job: Job) -> None:
        """Ends a job whose deadline has passed."""
        # Or nobody would learn from what never ends in time.
        for index in job.live():
            if job.places[index] != WAITING:
                self.measure(job, index, is_done=False)
        why = Failure("DEADLINE_EXCEEDED", "the deadline passed before every image was finished")
        self.end_job(job, JobState.DEADLINE, "deadline", why)

    def finish_image(self, ref: ImageRef, result: bytes | Failure) -> None:
        job = self.jobs[ref.job_id]
        if isinstance(result, Failure):
            self.end_image(ref, "error")
            self.end_job(job, JobState.ERROR, "cancelled", result)
            return
        job.results[ref.index] = result
        self.measure(job, ref.index, is_done=True)
        self.end_image(ref, "done")
        if not job.live():
            self.end_job(job, JobState.IMAGES, "cancelled", None)
        else:
            self.wake(ref.job_id)
            self.release()

    def _give_up(self, entry: StreamEntry, stage: Stage) -> None:
        message = f"the {stage.service} did not finish this image in {entry.deliveries} attempts"
        new, number = self.jobs[entry.ref.job_id].new, next(self._entry_ids)
        letter = DeadLetter(
            str(number), entry.ref, stage.service, entry.deliveries, message, self.clock(), new.tenant, new.spec
        )
        self.dead = [*self.dead, letter][-self.policy.max_dead :]
        self.totals[f"given_up:{stage}"] += 1
        self.finish_image(entry.ref, Failure("INTERNAL", message, stage.service))

    def take(self, stage: Stage, worker_id: str, count: int) -> list[Entry]:
        """Up to `count` entries for a worker; see take.lua."""
        self.release()
        most = self.policy.max_deliveries
        held = [entry.deliveries for entry in self.streams[stage].values() if entry.owner == worker_id]
        suspects, alone = max(held, default=0) > 1, max(held, default=0) >= most
        taken: list[Entry] = []
        waits = False
        for entry in self._claimable(stage, worker_id):
            failures = entry.deliveries
            last = 0 < failures >= most - 1
            if failures >= most:
                self._give_up(entry, stage)
            elif last and (held or taken):
                waits = waits or (not alone and self._clears_its_hands(stage, worker_id))
            elif len(taken) < count and not alone and (failures or not suspects):
                if entry.owner != UNTRIED:
                    self.totals[f"redelivered:{stage}"] += 1
                taken.append(self._deliver(entry, stage, worker_id))
                suspects, alone = suspects or failures > 0, last
                if last:
                    self._cleared.pop(stage, None)
        if suspects or waits:
            return taken
        fresh = [entry for entry in self.streams[stage].values() if entry.owner is None]
        return taken + [self._deliver(entry, stage, worker_id) for entry in fresh[: count - len(taken)]]

    def _claimable(self, stage: Stage, worker_id: str) -> Iterator[StreamEntry]:
        """Entries that were delivered, and that nobody beat for a lease."""
        lapsed_s = self.clock() - self.policy.lease_s
        for entry in list(self.streams[stage].values()):
            # Giving one up ends its job, and with it other entries.
            still_there = entry.id in self.streams[stage]
            if still_there and entry.owner not in (None, worker_id) and entry.delivered_at_s <= lapsed_s:
                yield entry

    def _clears_its_hands(self, stage: Stage, worker_id: str) -> bool:
        """Whether this is the worker, one of a stage at a time, that takes nothing more until it holds nothing."""
        who, until_s = self._cleared.get(stage, (worker_id, 0.0))
        if who != worker_id and until_s > self.clock():
            return False
        self._cleared[stage] = worker_id, self.clock() + self.policy.lease_s
        return True

    def _deliver(self, entry: StreamEntry, stage: Stage, worker_id: str) -> Entry:
        now_s, job = self.clock(), self.jobs[entry.ref.job_id]
        entry.owner, entry.delivered_at_s = worker_id, now_s
        entry.deliveries += 1
        return Entry(
            id=entry.id,
            stage=stage,
            ref=entry.ref,
            payload=entry.payload,
            attempt=entry.deliveries,
            enqueued_at_s=entry.enqueued_at_s,
            deadline_at_s=job.deadline_at_s,
            remaining_s=job.deadline_at_s - now_s,
            traceparent=job.new.traceparent,
        )

    def measure(self, job: Job, index: int, *, is_done: bool) -> None:
        """Counts an image that is under way; what did not end says only that it takes longer."""
        now_s, slots, work, last_done_s = self.clock(), self.num_slots(), job.new.work, self.measured.last_done_s
        released_at_s, load = job.released.get(index, (now_s, self.under_way()))
        if is_done:
            self.measured.last_done_s = now_s
        if released_at_s < self.measured.steady_since_s:
            return
        time_s, load_mean = now_s - released_at_s, (load + self.under_way()) / 2
        sums = self.measured.classes.setdefault(class_of(load_mean), Sums())
        if is_done or not sums.n or sums.image_s(work) <= time_s:
            sums.add(work, time_s, load_mean, memory=self.policy.memory)
            sums.at_s = now_s
        if is_done and self.under_way() >= slots:
            since_s = max(last_done_s, self.measured.full_since_s)
            self.measured.add_busy(work, slots * max(0.0, now_s - since_s))
