"""The contract between the gateway, the stages and what carries their work.

Two implementations keep it: `redis_streams` (processes) and `memory` (one process, tests). One contract test runs over
both. Payloads are bytes; this module knows neither protobuf nor torch.

A job has images; an image is in exactly one place at a time: waiting, in one stage's stream, or terminal. Its field
names that place together with the stream entry that holds it, so every hand-over is a compare-and-set and a worker that
comes too late changes nothing. Execution is at least once, effects are exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from streamflow.types import NO_QUOTA, Failure, JobState, Quota, Stage, WorkerInfo

Payload = Mapping[str, bytes]
"""What one stage tells the next: references to blobs and small tensors, by name."""


def blob_name(data: bytes) -> str:
    """What bytes are stored under: their SHA-256."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of one job; `str` gives `<job>:<index>`."""

    job_id: str
    index: int

    def __str__(self) -> str:
        return f"{self.job_id}:{self.index}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One delivery of one image to one worker.

    Attributes:
        id: of the stream entry; a redelivery has the same one.
        attempt: 1 for the first delivery.
        enqueued_at_s: when the entry was appended, by the transport's clock.
        deadline_at_s: of the job, by the transport's clock; `remaining_s` counts from the moment it was read.
    """

    id: str
    stage: Stage
    ref: ImageRef
    payload: Payload
    attempt: int = 1
    enqueued_at_s: float = 0.0
    deadline_at_s: float = 0.0
    remaining_s: float = 0.0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A request at admission.

    Attributes:
        id: unique in the deployment.
        digest: SHA-256 of the request, so that the same id with another request is refused.
        spec: opaque bytes for the stages (a JobSpec message).
        timeout_s: from now to the deadline.
        priority: -1 low, 0 normal, 1 high.
        work: what each image costs, in units of the deployment's choice; estimates and fairness go by it.
        reserved_bytes: what its results may take.
        watch_lease_s: the job is cancelled when nobody has watched it for so long; None = detached.
        nonce: of the call that admits it, so that a retry of it after a lost reply is not taken for somebody else's.
        quota: the tenant's own, in place of what `Limits` says of every tenant.
        blobs: its images by `blob_name`, stored when it is admitted and kept beyond its deadline.
    """

    id: str
    digest: str
    spec: bytes
    num_images: int
    tenant: str = ""
    timeout_s: float = 600.0
    priority: int = 0
    work: float = 1.0
    reserved_bytes: int = 0
    watch_lease_s: float | None = None
    traceparent: str = ""
    nonce: str = ""
    quota: Quota = NO_QUOTA
    blobs: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images: got {self.num_images}; allowed: 1 or more")
        if not 1e-3 <= self.work < inf:
            raise ValueError(f"work: got {self.work}; allowed: 0.001 or more")


@dataclass(frozen=True, slots=True)
class Admission:
    """`attached` when the same id and digest were there already."""

    attached: bool
    admitted_at_s: float
    deadline_at_s: float


@dataclass(frozen=True, slots=True, order=True)
class JobPlace:
    """Where a job is in the order of admission; it stays a place when the job is gone."""

    admitted_at_s: float
    id: str


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it stands; `images[k]` is waiting, encode, denoise, decode, done, error, cancelled or deadline.

    `estimate_s` is how long it was expected to take when it was admitted; None = nothing had been measured.
    """

    id: str
    state: JobState
    spec: bytes
    tenant: str
    images: tuple[str, ...]
    admitted_at_s: float
    deadline_at_s: float
    finished_at_s: float | None = None
    failure: Failure | None = None
    warnings: tuple[str, ...] = ()
    estimate_s: float | None = None

    @property
    def place(self) -> JobPlace:
        return JobPlace(self.admitted_at_s, self.id)

    @property
    def num_finished(self) -> int:
        return sum(state == "done" for state in self.images)


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """Images of all jobs that will be released before this job's first waiting one; None = nothing waits.

    `estimate_s` is how long the job may take from now on, as measured on others; None while there is nothing to go by.
    """

    ahead: int | None
    estimate_s: float | None = None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a beat found out: entries that are no longer ours, and entries whose image is already terminal."""

    lost: frozenset[str] = frozenset()
    cancelled: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps that ADMIT enforces; beyond them it raises BusyError.

    Attributes:
        max_jobs, max_tenant_jobs: unfinished at once, over all and of one tenant; None = no limit of its own.
        max_reserved_bytes, max_tenant_reserved_bytes: what results may take, likewise.
        tenant_images_per_minute: of one tenant; a minute's worth may come at once. 0 = any number.
    """

    max_jobs: int = 1000
    max_tenant_jobs: int | None = None
    max_reserved_bytes: int = 512 * 2**20
    max_tenant_reserved_bytes: int | None = None
    tenant_images_per_minute: float = 0.0

    def jobs_of(self, quota: Quota) -> int:
        """Most unfinished jobs of a tenant."""
        return (self.max_tenant_jobs if quota.jobs is None else quota.jobs) or self.max_jobs

    def images_per_minute_of(self, quota: Quota) -> float:
        """Of a tenant; 0 = any number."""
        return self.tenant_images_per_minute if quota.images_per_minute is None else quota.images_per_minute


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An image that was given up: which, where, after how many attempts and why; `spec` is its job's."""

    id: str
    ref: ImageRef
    service: str
    attempts: int
    reason: str
    at_s: float
    tenant: str
    spec: bytes


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that is over, for whoever writes that down."""

    id: str
    state: JobState
    took_s: float


@dataclass(frozen=True, slots=True)
class Queue:
    """Images of one priority that are in one place: waiting, encode, denoise or decode.

    `oldest_s` is how long the oldest of them has been there; of those that wait, since their admission.
    """

    place: str
    priority: int
    images: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class Overview:
    """A deployment as a whole, over all its gateways and workers.

    Attributes:
        totals: what happened since there is a store, each once (but a refusal whose answer was lost and that was sent
            again counts again): `admitted` and `admitted_images`; `refused:<why>`;
            `ended:<state>` of jobs and `images:<state>` of images; `redelivered:<stage>` and `given_up:<stage>`.
        dead_letters: how many are kept.
    """

    queues: tuple[Queue, ...]
    totals: Mapping[str, int]
    dead_letters: int


@dataclass(frozen=True, slots=True)
class PreviewTask:
    """Latents of an unfinished image, for a decoder that has nothing better to do."""

    ref: ImageRef
    step: int
    payload: Payload = field(default_factory=dict)


class Transport(Protocol):
    """All methods are safe to repeat: a retry after a lost reply has no second effect.

    One worker id reads with one call at a time.
    """

    @property
    def lease_s(self) -> float:
        """An entry without a heartbeat for so long goes to another worker."""
        ...

    # -- gateways ----------------------------------------------------------------------------------------------------

    async def admit(self, job: NewJob) -> Admission:
        """Writes the job down and queues its images, or attaches to the same one.

        Raises:
            AlreadyExistsError: the id is there with another digest.
            BusyError: over `Limits`, what waits would not let it end in time, or the store is full.
            DeadlineError: it would not end in time even if nothing waited.
            UnavailableError: the store cannot be reached.
        """
        ...

    async def look(self, job: NewJob) -> Admission | None:
        """Does what `admit` does up to the admission itself: attaches to the same job, or refuses in the same way.

        None = it would be admitted now, so what that takes is worth preparing.
        """
        ...

    async def job(self, job_id: str) -> JobView:
        """Raises NotFoundError when the id is unknown or its tombstone has expired."""
        ...

    async def jobs(self, *, tenant: str = "", after: JobPlace | None = None, count: int = 100) -> list[JobView]:
        """A tenant's jobs, newest first; fewer than `count` only where there are no more.

        Args:
            after: where the page before ended, whether that job is still there or not.
        """
        ...

    async def result(self, ref: ImageRef) -> bytes | None:
        """The stored bytes of a finished image; None while there are none."""
        ...

    async def mark_delivered(self, job_id: str) -> None:
        """The client has read everything: the results may go after a minute."""
        ...

    async def cancel(
        self, job_id: str, *, state: JobState = JobState.CANCELLED, failure: Failure | None = None
    ) -> bool:
        """Makes a running job terminal; False when it was terminal already. Raises NotFoundError."""
        ...

    async def renew_watch(self, job_id: str) -> None:
        """Somebody still watches."""
        ...

    async def queue_position(self, job_id: str) -> QueuePosition: ...

    async def expected_s(self, works: Sequence[float], *, num_images: int) -> list[float | None]:
        """How long jobs of so much work an image would take if they came now; None while nothing fresh is known."""
        ...

    def subscribe(self, job_id: str) -> AbstractAsyncContextManager[AsyncIterator[bytes | None]]:
        """Wake-ups of a job: published events, and None when only the state changed. Lossy; the job is the truth.

        The subscription is active once the context is entered. The iterator also yields None about every second, so
        that its reader looks at the job again.
        """
        ...

    async def reap(self) -> int:
        """Ends jobs past their deadline or watch lease, frees expired results; returns how many it touched."""
        ...

    async def take_ended(self) -> list[EndedJob]:
        """Jobs that ended since anybody asked last, however they did: each is told once, or not at all where the answer
        is lost."""
        ...

    async def dead_letters(self, *, tenant: str, count: int = 100) -> list[DeadLetter]:
        """What was given up of a tenant's, newest first, as long as it is kept."""
        ...

    async def remove_dead_letter(self, letter_id: str) -> None: ...

    # -- workers -----------------------------------------------------------------------------------------------------

    async def read(self, stage: Stage, worker_id: str, count: int, *, block_s: float = 1.0) -> list[Entry]:
        """At most `count` entries, redeliveries first; empty after `block_s` (at most 2) without any.

        A worker that holds a redelivery after a failure gets no fresh entries, and one that holds a last attempt gets
        nothing; a last attempt comes only to a worker that holds nothing.

        Entries of terminal images and entries delivered too often never come back from here: they are acknowledged,
        the latter after FINISH(ERROR) and a note in `dead`.
        """
        ...

    def ended_jobs(self) -> AbstractAsyncContextManager[AsyncIterator[str | None]]:
        """Ids of jobs that end while their images are being worked on, and None about every second. Lossy.

        A heartbeat says which entries that concerns.
        """
        ...

    async def spec(self, job_id: str) -> bytes:
        """The job's opaque bytes. Raises NotFoundError."""
        ...

    async def advance(self, entry: Entry, to: Stage, payload: Payload, *, warnings: Sequence[str] = ()) -> bool:
        """Hands the image to another stage and acknowledges `entry`, at once; False when it came too late."""
        ...

    async def finish(self, entry: Entry, result: bytes | Failure) -> bool:
        """Stores the result (or fails the job) and acknowledges `entry`, at once.

        False when it came too late: the entry is somebody else's by now, or the job's deadline passed, which ends it.
        """
        ...

    async def heartbeat(self, stage: Stage, worker_id: str, entries: Iterable[Entry]) -> Heartbeat:
        """Renews the leases of the entries on which there was progress.

        The worker's own move may be why an entry is told of, its answer still on the way: that one tells more. So it
        stays in hand until a move of it is answered, or until it is put down.
        """
        ...

    def put_down(self, entries: Iterable[Entry]) -> None:
        """Lets go of entries that were told of and are not worked on any more: a read may give them out again."""
        ...

    async def hand_back(
        self, stage: Stage, worker_id: str, entries: Iterable[Entry] | None, *, count_attempt: bool
    ) -> int:
        """Lets any worker claim the entries at once; an orderly shutdown does not count as an attempt.

        None = everything that the worker was given, also where the reply was lost. Returns how many it handed back.
        """
        ...

    async def put_blob(self, data: bytes, *, keep_s: float, admitted: bool = False) -> str:
        """Stores bytes under their SHA-256 and returns it; kept at least `keep_s` from now.

        Args:
            admitted: they are for admitted work, which goes on when the store is full.

        Raises:
            BusyError: the store is full, and they are not for admitted work.
        """
        ...

    async def get_blob(self, sha256: str) -> bytes | None: ...

    async def put_cached(self, key: str, data: bytes, *, keep_s: float) -> None:
        """Stores a computed value under a key of the caller's (a content hash of what it was computed from)."""
        ...

    async def get_cached(self, key: str, *, keep_s: float) -> bytes | None:
        """The value, kept at least `keep_s` from now; None when it is not there."""
        ...

    async def publish(self, job_id: str, event: bytes) -> None:
        """Sends a lossy event (progress, preview) to whoever watches."""
        ...

    async def push_preview(self, task: PreviewTask) -> None:
        """Offers latents to the decoders; the oldest are dropped first."""
        ...

    async def pop_preview(self) -> PreviewTask | None: ...

    # -- everybody ---------------------------------------------------------------------------------------------------

    async def register(self, worker: WorkerInfo, *, lease_s: float) -> None: ...

    async def unregister(self, worker_id: str) -> None: ...

    async def workers(self) -> list[WorkerInfo]:
        """Replicas whose lease has not lapsed."""
        ...

    async def lease_gpu(self, holder: str, gpus: Sequence[str], *, weight: float, lease_s: float) -> str:
        """Gives the holder the GPU with the least weight of live leases, the first of several, for `lease_s`.

        Called again it renews: a holder keeps the GPU that it has, as long as that is among `gpus`.
        """
        ...

    async def free_gpu(self, holder: str) -> None:
        """Ends its lease."""
        ...

    async def backlog(self, revision: str | None = None) -> dict[str, int]:
        """Images by place: waiting, and undelivered plus pending entries of each stage.

        Args:
            revision: of the model, whose stages are meant; None = the transport's own. All revisions wait in one queue.
        """
        ...

    async def overview(self) -> Overview: ...

    async def ping(self) -> None:
        """Raises UnavailableError when the store cannot take writes."""
        ...

    async def close(self) -> None: ...
