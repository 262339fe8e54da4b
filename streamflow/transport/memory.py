"""The transport within one process: for tests, and for a gateway with its workers in the same process.

It keeps the contract of the Redis one.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from math import inf

from streamflow.errors import AlreadyExistsError, BusyError, NotFoundError
from streamflow.gpus import least_used
from streamflow.transport.base import (
    Admission,
    DeadLetter,
    EndedJob,
    Entry,
    Heartbeat,
    ImageRef,
    JobPlace,
    JobView,
    Limits,
    NewJob,
    Overview,
    Payload,
    PreviewTask,
    QueuePosition,
    blob_name,
)
from streamflow.transport.events import Mailboxes, follow
from streamflow.transport.memory_jobs import NOBODY, UNTRIED, WAITING, Job, State
from streamflow.transport.policy import Policy
from streamflow.transport.refusals import busy, too_late
from streamflow.types import Failure, JobState, Stage, WorkerInfo

_ENDED = "\0ended"  # no job's id
_MAX_BLOCK_S = 2.0


@dataclass(frozen=True, slots=True)
class _GpuLease:
    gpu: str
    weight: float
    lapses_at_s: float


class MemoryTransport:
    """Implements `base.Transport` for one event loop; nothing outlives the process.

    Args:
        clock: seconds; leases, deadlines and expiry go by it, blocking reads by real time.
    """

    def __init__(
        self, *, limits: Limits | None = None, policy: Policy | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._limits = limits or Limits()
        self._policy = policy or Policy()
        self._clock = clock
        self._boxes = Mailboxes()
        self._state = State(self._policy, clock, wake=self._wake, ended=self._tell_ended)
        self._changed = asyncio.Event()
        self._kept: dict[str, tuple[bytes, float]] = {}
        self._gpus: dict[str, _GpuLease] = {}
        self._previews: deque[PreviewTask] = deque(maxlen=self._policy.max_previews)
        self._reaped_at_s, self._watch_grace_until_s = clock(), 0.0

    def __repr__(self) -> str:
        return f"MemoryTransport({len(self._state.jobs)} jobs, {self._state.under_way()} images under way)"

    @property
    def lease_s(self) -> float:
        return self._policy.lease_s

    # -- gateways ----------------------------------------------------------------------------------------------------

    async def admit(self, job: NewJob) -> Admission:
        attached = self._attach(job)
        if attached is not None:
            return attached
        paced_s = self._refuse_over_limits(job)
        now_s = self._clock()
        ranks, clock_s = self._ranks(job, now_s)
        estimate_s = self._refuse_late(job, ranks[0])
        deadline_at_s = now_s + job.timeout_s
        watch_until_s = None if job.watch_lease_s is None else now_s + job.watch_lease_s
        for name, data in job.blobs.items():
            self._keep(f"blob:{name}", data, job.timeout_s + self._policy.blob_margin_s)
        admitted = Job(
            replace(job, blobs={}),
            now_s,
            deadline_at_s,
            job.watch_lease_s,
            watch_until_s,
            [WAITING] * job.num_images,
            estimate_s=estimate_s,
        )
        self._state.jobs[job.id] = admitted
        self._state.totals.update({"admitted": 1, "admitted_images": job.num_images})
        insort(self._state.listed[job.tenant], admitted.place)
        self._state.clocks[job.tenant], self._state.paced[job.tenant] = clock_s, paced_s
        self._state.waiting.update({ImageRef(job.id, index): rank for index, rank in enumerate(ranks)})
        self._state.release()
        return Admission(False, now_s, deadline_at_s)

    async def look(self, job: NewJob) -> Admission | None:
        attached = self._attach(job)
        if attached is None:
            self._refuse_over_limits(job)
            ranks, _ = self._ranks(job, self._clock())
            self._refuse_late(job, ranks[0])
        return attached

    async def job(self, job_id: str) -> JobView:
        return self._job(job_id).view()

    async def jobs(self, *, tenant: str = "", after: JobPlace | None = None, count: int = 100) -> list[JobView]:
        listed = self._state.listed.get(tenant, [])
        end = len(listed) if after is None else bisect_left(listed, after)
        return [self._state.jobs[place.id].view() for place in reversed(listed[max(0, end - count) : end])]

    async def result(self, ref: ImageRef) -> bytes | None:
        job = self._state.jobs.get(ref.job_id)
        return None if job is None else job.results.get(ref.index)

    async def mark_delivered(self, job_id: str) -> None:
        job = self._state.jobs.get(job_id)
        if job is not None and job.results_until_s is not None:
            job.delivered = True
            job.results_until_s = min(job.results_until_s, self._clock() + self._policy.delivered_s)

    async def cancel(
        self, job_id: str, *, state: JobState = JobState.CANCELLED, failure: Failure | None = None
    ) -> bool:
        if not state.terminal:
            raise ValueError(f"state: got {state!r}; allowed: a terminal one")
        job = self._job(job_id)
        if job.state.terminal:
            return False
        self._state.end_job(job, state, state.value, failure or Failure("CANCELLED", "the job was cancelled"))
        return True

    async def renew_watch(self, job_id: str) -> None:
        job = self._state.jobs.get(job_id)
        if job is not None and job.watch_lease_s is not None:
            job.watch_until_s = self._clock() + job.watch_lease_s

    async def queue_position(self, job_id: str) -> QueuePosition:
        job = self._job(job_id)
        if WAITING not in job.places:
            return QueuePosition(None)
        ahead = self._state.queue().index(ImageRef(job_id, job.places.index(WAITING)))
        work = self._state.work_before(ahead)
        return QueuePosition(ahead, self._state.estimate_s(work, job.new.work, len(job.live())))

    async def expected_s(self, works: Sequence[float], *, num_images: int) -> list[float | None]:
        ahead = self._state.work_before(len(self._state.waiting))
        estimates = [self._state.estimate(ahead, work, num_images) for work in works]
        return [expected_s if fresh else None for expected_s, fresh in estimates]

    @asynccontextmanager
    async def subscribe(self, job_id: str) -> AsyncIterator[AsyncIterator[bytes | None]]:
        with self._boxes.open(job_id) as queue:
            yield follow(queue)

    async def reap(self) -> int:
        now_s = self._clock()
        if now_s - self._reaped_at_s > self._policy.reap_gap_s:
            self._watch_grace_until_s = now_s + self._policy.watch_grace_s
        self._reaped_at_s = now_s
        self._state.look_after_measuring()
        late = [job for job in self._state.open_jobs() if job.deadline_at_s <= now_s]
        for job in late:
            self._state.end_late(job)
        touched = len(late) + (self._reap_unwatched(now_s) if now_s >= self._watch_grace_until_s else 0)
        self._state.release()
        return touched + self._reap_expired(now_s)

    async def take_ended(self) -> list[EndedJob]:
        ends = list(self._state.ends)
        self._state.ends.clear()
        return ends

    async def dead_letters(self, *, tenant: str, count: int = 100) -> list[DeadLetter]:
        return [letter for letter in reversed(self._state.dead) if letter.tenant == tenant][:count]

    async def remove_dead_letter(self, letter_id: str) -> None:
        self._state.dead = [letter for letter in self._state.dead if letter.id != letter_id]

    # -- workers -----------------------------------------------------------------------------------------------------

    async def read(self, stage: Stage, worker_id: str, count: int, *, block_s: float = 1.0) -> list[Entry]:
        if count < 1:
            raise ValueError(f"count: got {count}; allowed: 1 or more")
        taken = self._state.take(stage, worker_id, count)
        if taken or block_s <= 0:
            return taken
        try:
            async with asyncio.timeout(min(block_s, _MAX_BLOCK_S)):
                while not taken:
                    self._changed.clear()
                    await self._changed.wait()
                    taken = self._state.take(stage, worker_id, count)
        except TimeoutError:
            return []
        return taken

    @asynccontextmanager
    async def ended_jobs(self) -> AsyncIterator[AsyncIterator[str | None]]:
        with self._boxes.open(_ENDED) as queue:
            yield (None if job_id is None else job_id.decode() async for job_id in follow(queue))

    async def spec(self, job_id: str) -> bytes:
        return self._job(job_id).new.spec

    async def advance(self, entry: Entry, to: Stage, payload: Payload, *, warnings: Sequence[str] = ()) -> bool:
        if not self._state.is_at(entry, entry.stage):
            return False
        self._state.jobs[entry.ref.job_id].warnings.update(dict.fromkeys(warnings))
        del self._state.streams[entry.stage][entry.id]
        self._state.enqueue(entry.ref, to, payload)
        self._wake(entry.ref.job_id)
        return True

    async def finish(self, entry: Entry, result: bytes | Failure) -> bool:
        if not self._state.is_at(entry, entry.stage):
            return False
        job = self._state.jobs[entry.ref.job_id]
        if job.deadline_at_s <= self._clock():
            # Not when the reaper comes by: how a job ends must not depend on that.
            self._state.end_late(job)
            return False
        self._state.finish_image(entry.ref, result)
        return True

    async def heartbeat(self, stage: Stage, worker_id: str, entries: Iterable[Entry]) -> Heartbeat:
        lost, cancelled = set(), set()
        for entry in entries:
            mine = self._state.streams[stage].get(entry.id)
            job = self._state.jobs.get(entry.ref.job_id)
            if mine is not None and mine.owner == worker_id:
                mine.delivered_at_s = self._clock()
            elif mine is None and job is not None and entry.ref.index not in job.live():
                cancelled.add(entry.id)
            else:
                lost.add(entry.id)
        return Heartbeat(frozenset(lost), frozenset(cancelled))

    def put_down(self, entries: Iterable[Entry]) -> None:
        pass  # who has an entry stands in its stream alone

    async def hand_back(
        self, stage: Stage, worker_id: str, entries: Iterable[Entry] | None, *, count_attempt: bool
    ) -> int:
        ids = None if entries is None else {entry.id for entry in entries}
        mine = [
            entry
            for entry in self._state.streams[stage].values()
            if entry.owner == worker_id and (ids is None or entry.id in ids)
        ]
        for entry in mine:
            entry.owner, entry.delivered_at_s = NOBODY if count_attempt else UNTRIED, -inf
            if count_attempt:
                pause_s = self._policy.retry_s * 2 ** (entry.deliveries - 1)
                entry.delivered_at_s = self._clock() - max(0.0, self._policy.lease_s - pause_s)
            else:
                entry.deliveries -= 1
        self._changed.set()
        return len(mine)

    async def put_blob(self, data: bytes, *, keep_s: float, admitted: bool = False) -> str:
        sha256 = blob_name(data)
        self._keep(f"blob:{sha256}", data, keep_s)
        return sha256

    async def get_blob(self, sha256: str) -> bytes | None:
        data, until_s = self._kept.get(f"blob:{sha256}", (None, 0.0))
        return data if until_s > self._clock() else None

    async def put_cached(self, key: str, data: bytes, *, keep_s: float) -> None:
        self._keep(f"cached:{key}", data, keep_s)
        cached = sorted((until_s, name) for name, (_, until_s) in self._kept.items() if name.startswith("cached:"))
        excess = sum(len(self._kept[name][0]) for _, name in cached) - self._policy.max_cached_bytes
        for _, name in cached:
            if excess <= 0:
                break
            excess -= len(self._kept.pop(name)[0])

    async def get_cached(self, key: str, *, keep_s: float) -> bytes | None:
        data, _ = self._kept.get(f"cached:{key}", (None, 0.0))
        if data is not None:
            self._keep(f"cached:{key}", data, keep_s)
        return data

    async def publish(self, job_id: str, event: bytes) -> None:
        self._boxes.put(job_id, event)

    async def push_preview(self, task: PreviewTask) -> None:
        self._previews.append(task)

    async def pop_preview(self) -> PreviewTask | None:
        return self._previews.popleft() if self._previews else None

    # -- everybody ---------------------------------------------------------------------------------------------------

    async def register(self, worker: WorkerInfo, *, lease_s: float) -> None:
        self._state.workers[worker.worker_id] = worker, self._clock() + lease_s

    async def unregister(self, worker_id: str) -> None:
        self._state.workers.pop(worker_id, None)

    async def workers(self) -> list[WorkerInfo]:
        return [worker for worker, lapses_s in self._state.workers.values() if lapses_s > self._clock()]

    async def lease_gpu(self, holder: str, gpus: Sequence[str], *, weight: float, lease_s: float) -> str:
        if not gpus:
            raise ValueError("gpus: got none; allowed: 1 or more")
        now_s = self._clock()
        live = {name: lease for name, lease in self._gpus.items() if lease.lapses_at_s > now_s}
        mine = live.pop(holder, None)
        if mine is not None and mine.gpu in gpus:
            gpu = mine.gpu
        else:
            load: defaultdict[str, float] = defaultdict(float)
            for lease in live.values():
                load[lease.gpu] += lease.weight
            gpu = least_used(gpus, load)
        self._gpus = {**live, holder: _GpuLease(gpu, weight, now_s + lease_s)}
        return gpu

    async def free_gpu(self, holder: str) -> None:
        self._gpus.pop(holder, None)

    async def backlog(self, revision: str | None = None) -> dict[str, int]:
        # There is one revision in a process.
        lengths = {stage.value: len(entries) for stage, entries in self._state.streams.items()}
        return {WAITING: len(self._state.waiting), **lengths}

    async def overview(self) -> Overview:
        return Overview(self._state.queues(), dict(self._state.totals), len(self._state.dead))

    async def ping(self) -> None:
        return

    async def close(self) -> None:
        return

    # -- inside ------------------------------------------------------------------------------------------------------

    def _wake(self, job_id: str) -> None:
        self._boxes.put(job_id, b"")
        self._changed.set()

    def _tell_ended(self, job_id: str) -> None:
        self._boxes.put(_ENDED, job_id.encode())

    def _job(self, job_id: str) -> Job:
        if job_id not in self._state.jobs:
            raise NotFoundError(f"no job {job_id}; it never was, or it ended more than an hour ago")
        return self._state.jobs[job_id]

    def _attach(self, job: NewJob) -> Admission | None:
        known = self._state.jobs.get(job.id)
        if known is None:
            return None
        if known.new.digest != job.digest:
            raise AlreadyExistsError(f"a different request has the id {job.id} already; use another id")
        attached = not job.nonce or known.new.nonce != job.nonce
        if not known.state.terminal:
            # Whoever leaves it to itself wants it made without being watched.
            known.watch_lease_s = job.watch_lease_s and known.watch_lease_s
            known.watch_until_s = known.watch_lease_s and self._clock() + known.watch_lease_s
        return Admission(attached, known.admitted_at_s, known.deadline_at_s)

    def _refuse_over_limits(self, job: NewJob) -> float:
        """Returns what `_paced` says."""
        open_jobs = self._state.open_jobs()
        if len(open_jobs) >= self._limits.max_jobs:
            raise self._busy("jobs")
        of_tenant = sum(known.new.tenant == job.tenant for known in open_jobs)
        if of_tenant >= self._limits.jobs_of(job.quota):
            raise self._busy("tenant_jobs")
        paced_s = self._paced(job)
        of_tenant_bytes = self._limits.max_tenant_reserved_bytes
        if of_tenant_bytes is not None and not self._has_room(job, of_tenant_bytes, whose=job.tenant):
            raise self._busy("tenant_bytes")
        if not self._has_room(job, self._limits.max_reserved_bytes):
            raise self._busy("bytes")
        return paced_s

    def _has_room(self, job: NewJob, most: int, *, whose: str | None = None) -> bool:
        """Whether so many bytes are left, of one tenant's or of all. Results that their client has read go first."""
        jobs = [known for known in self._state.jobs.values() if whose is None or known.new.tenant == whose]
        delivered = [known for known in jobs if known.delivered]
        reserved_bytes = job.reserved_bytes // job.num_images * job.num_images
        while sum(known.reserved_bytes for known in jobs) + reserved_bytes > most:
            if not delivered:
                return False
            delivered.pop(0).results.clear()
        return True

    def _paced(self, job: NewJob) -> float:
        """Until when the tenant's images would have been made, evenly, at the rate that it may have."""
        now_s, per_minute = self._clock(), self._limits.images_per_minute_of(job.quota)
        paced_s = max(now_s, self._state.paced[job.tenant])
        if per_minute:
            paced_s += 60 * job.num_images / per_minute
            if paced_s > now_s + 60:
                raise self._refused("rate", paced_s - now_s - 60)
        return paced_s

    def _ranks(self, job: NewJob, now_s: float) -> tuple[list[float], float]:
        """Places of a job's images in the queue, and where that leaves its tenant's clock; see admit.lua."""
        start_s = max(now_s, self._state.clocks[job.tenant] if self._state.waiting else 0.0)
        slot_seconds = self._state.measured.slot_seconds(job.work)
        each_s = slot_seconds / self._state.num_slots() if slot_seconds else job.work * self._policy.work_s
        urgent_s = now_s + job.timeout_s - self._policy.urgent_s
        early_s = self._policy.priority_weight_s * job.priority
        ranks = [min(start_s + k * each_s - early_s, urgent_s + k * 1e-6) for k in range(job.num_images)]
        return ranks, start_s + job.num_images * each_s

    def _refuse_late(self, job: NewJob, rank: float) -> float | None:
        before = sum(other <= rank for other in self._state.waiting.values())
        expected_s, fresh = self._state.estimate(self._state.work_before(before), job.work, job.num_images)
        allowed_s = job.timeout_s / self._policy.headroom
        if expected_s is not None and fresh and expected_s > allowed_s:
            alone_s = self._state.alone_s(job.work, job.num_images)
            if alone_s > allowed_s:
                self._state.totals["refused:late"] += 1
                raise too_late(alone_s, left_s=job.timeout_s)
            raise self._refused("work", expected_s - allowed_s)
        return expected_s

    def _busy(self, why: str) -> BusyError:
        queue_s = self._state.estimate_s(self._state.work_before(len(self._state.waiting)), 0.0, 1) or 0.0
        return self._refused(why, queue_s)

    def _refused(self, why: str, retry_after_s: float) -> BusyError:
        self._state.totals[f"refused:{why}"] += 1
        return busy(why, retry_after_s=min(60.0, max(1.0, retry_after_s)))

    def _keep(self, name: str, data: bytes, keep_s: float) -> None:
        _, until_s = self._kept.get(name, (b"", 0.0))
        self._kept[name] = data, max(until_s, self._clock() + keep_s)

    def _reap_unwatched(self, now_s: float) -> int:
        unwatched = [job for job in self._state.open_jobs() if (job.watch_until_s or inf) <= now_s]
        for job in unwatched:
            why = Failure("CANCELLED", "nobody watched the job any more")
            self._state.end_job(job, JobState.CANCELLED, "cancelled", why)
        return len(unwatched)

    def _reap_expired(self, now_s: float) -> int:
        ended = [job for job in self._state.jobs.values() if job.finished_at_s is not None]
        expired = [job for job in ended if job.results and (job.results_until_s or inf) <= now_s]
        for job in expired:
            job.results.clear()
        buried = [job for job in ended if (job.finished_at_s or 0.0) + self._policy.tombstone_s <= now_s]
        for job in buried:
            del self._state.jobs[job.new.id]
            self._state.listed[job.new.tenant].remove(job.place)
        gone = [name for name, (_, until_s) in self._kept.items() if until_s <= now_s]
        for name in gone:
            del self._kept[name]
        return len(expired) + len(buried) + len(gone)
