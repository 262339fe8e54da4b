"""The state of the memory transport: jobs, streams with leases, and the moves between them.

The same moves as `scripts/*.lua`, in the same words; here one event loop makes them atomic.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from streamflow.transport.base import Entry, ImageRef, JobPlace, JobView, NewJob, Payload
from streamflow.transport.policy import Policy
from streamflow.types import Failure, JobState, Stage, WorkerInfo

WAITING = "waiting"


@dataclass(slots=True)
class Job:
    new: NewJob
    admitted_at_s: float
    deadline_at_s: float
    watch_until_s: float | None
    places: list[str]
    state: JobState = JobState.QUEUED
    finished_at_s: float | None = None
    delivered: bool = False
    failure: Failure | None = None
    warnings: dict[str, None] = field(default_factory=dict)
    results: dict[int, bytes] = field(default_factory=dict)
    results_until_s: float | None = None

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
    """Everything a deployment knows. `wake` is called with the id of each job that changed."""

    def __init__(self, policy: Policy, clock: Callable[[], float], wake: Callable[[str], None]) -> None:
        self.policy = policy
        self.clock = clock
        self.wake = wake
        self.jobs: dict[str, Job] = {}
        self.listed: defaultdict[str, list[JobPlace]] = defaultdict(list)
        self.waiting: dict[ImageRef, float] = {}
        self.streams: dict[Stage, dict[str, StreamEntry]] = {stage: {} for stage in Stage}
        self.workers: dict[str, tuple[WorkerInfo, float]] = {}
        self.dead: list[tuple[ImageRef, str]] = []
        self.gap_s: float | None = None
        self._last_done_s = 0.0
        self._entry_ids = itertools.count(1)

    def queue(self) -> list[ImageRef]:
        """Waiting images in the order in which they will be released."""
        return sorted(self.waiting, key=self.waiting.__getitem__)

    def under_way(self) -> int:
        return sum(len(entries) for entries in self.streams.values())

    def open_jobs(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.state.terminal]

    def reserved_bytes(self) -> int:
        return sum(job.reserved_bytes for job in self.jobs.values())

    def window(self) -> int:
        now_s = self.clock()
        slots = sum(
            worker.slots
            for worker, lapses_s in self.workers.values()
            if worker.stage is Stage.DENOISE and not worker.draining and lapses_s > now_s
        )
        return 2 * slots or self.policy.min_window

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
            self._last_done_s = self.clock()
        for ref in self.queue()[: max(0, self.window() - self.under_way())]:
            del self.waiting[ref]
            self.enqueue(ref, Stage.ENCODE, {})
            self.jobs[ref.job_id].state = JobState.RUNNING
            self.wake(ref.job_id)

    def end_image(self, ref: ImageRef, state: str) -> None:
        """Takes an image out of wherever it is."""
        places = self.jobs[ref.job_id].places
        stage, _, entry_id = places[ref.index].partition(":")
        if entry_id:
            del self.streams[Stage(stage)][entry_id]
        self.waiting.pop(ref, None)
        places[ref.index] = state

    def end_job(self, job: Job, state: JobState, rest: str, failure: Failure | None) -> None:
        for index in job.live():
            self.end_image(ImageRef(job.new.id, index), rest)
        job.state, job.failure, job.finished_at_s = state, failure, self.clock()
        job.results_until_s = job.finished_at_s + self.policy.result_s
        self.wake(job.new.id)
        self.release()

    def finish_image(self, ref: ImageRef, result: bytes | Failure) -> None:
        job = self.jobs[ref.job_id]
        if isinstance(result, Failure):
            self.end_image(ref, "error")
            self.end_job(job, JobState.ERROR, "cancelled", result)
            return
        job.results[ref.index] = result
        self.end_image(ref, "done")
        self._measure_rate()
        if not job.live():
            self.end_job(job, JobState.IMAGES, "cancelled", None)
        else:
            self.wake(ref.job_id)
            self.release()

    def give_up(self, entry: StreamEntry, stage: Stage) -> None:
        message = f"the {stage.service} did not finish this image in {entry.deliveries} attempts"
        self.dead.append((entry.ref, message))
        self.finish_image(entry.ref, Failure("INTERNAL", message, stage.service))

    def claimable(self, stage: Stage, worker_id: str) -> Iterator[StreamEntry]:
        """Entries that were delivered, and that nobody beat for a lease."""
        lapsed_s = self.clock() - self.policy.lease_s
        for entry in list(self.streams[stage].values()):
            # Giving one up ends its job, and with it other entries.
            still_there = entry.id in self.streams[stage]
            if still_there and entry.owner not in (None, worker_id) and entry.delivered_at_s <= lapsed_s:
                yield entry

    def _measure_rate(self) -> None:
        gap_s = self.clock() - self._last_done_s
        self._last_done_s = self.clock()
        self.gap_s = gap_s if self.gap_s is None else 0.9 * self.gap_s + 0.1 * gap_s
