"""The transport over Redis streams. Every state move is one Lua script (`scripts/`); this file only calls them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager

import redis.asyncio as redis

from streamflow.config import Settings
from streamflow.errors import AlreadyExistsError, BusyError, NotFoundError
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
from streamflow.transport.events import RedisEvents, follow
from streamflow.transport.keys import Keys
from streamflow.transport.policy import Policy
from streamflow.transport.redis_access import RedisAccess
from streamflow.transport.redis_client import Calls, connect, redis_errors
from streamflow.transport.refusals import busy, too_late
from streamflow.transport.replies import (
    dead_letter_from,
    entry_from,
    job_from,
    overview_from,
    payload_args,
    places_from,
    preview_from,
    taken_by_script,
    worker_from,
    worker_text,
)
from streamflow.types import Failure, JobState, Stage, WorkerInfo

log = logging.getLogger(__name__)

_SUSPECTS_S = 0.1  # how often a worker that holds suspects looks for more of them, and whether it may read again
_MAX_BLOCK_S = 2.0  # well below the socket's time-out, which would break off a longer wait
_REAP_AT_ONCE = 100
_PAGE = 100
_MOST_LOOKED_AT = 10_000


class RedisTransport:
    """Implements `base.Transport`.

    One worker id reads from one transport, one call at a time: the transport remembers which entries it gave out, so
    that it can tell a delivery whose reply was lost from one that is being worked on.

    Args:
        client: see `redis_client.connect`; closed by `close`.
        deployment: name in every key.
        revision: of the model; jobs admitted here are worked on by stages of the same revision.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        deployment: str = "default",
        revision: str = "",
        limits: Limits | None = None,
        policy: Policy | None = None,
    ) -> None:
        self._client = client
        self._keys = Keys(deployment, revision)
        self._limits = limits or Limits()
        self._policy = policy or Policy()
        self._calls = Calls(client, self._keys, self._policy)
        self._events = RedisEvents(client)
        self._in_hand: dict[str, dict[str, Entry]] = {}

    @classmethod
    def from_url(
        cls,
        url: RedisAccess | str,
        *,
        deployment: str = "default",
        revision: str = "",
        limits: Limits | None = None,
        policy: Policy | None = None,
    ) -> RedisTransport:
        return cls(connect(url), deployment=deployment, revision=revision, limits=limits, policy=policy)

    @classmethod
    def of(cls, settings: Settings, *, revision: str, limits: Limits | None = None) -> RedisTransport:
        """The transport of a process with these settings."""
        policy = Policy(
            lease_s=settings.lease_s,
            result_s=settings.result_keep_s,
            # What cannot be asked for by its job is of no use.
            tombstone_s=max(settings.job_keep_s, settings.result_keep_s),
        )
        access = RedisAccess.of(settings)
        return cls.from_url(access, deployment=settings.deployment, revision=revision, limits=limits, policy=policy)

    def __repr__(self) -> str:
        return f"RedisTransport({self._keys.prefix}, in hand: {sum(map(len, self._in_hand.values()))})"

    @property
    def lease_s(self) -> float:
        return self._policy.lease_s

    # -- gateways ----------------------------------------------------------------------------------------------------

    async def admit(self, job: NewJob) -> Admission:
        admission = await self._admit(job, looks=False)
        assert admission is not None
        return admission

    async def look(self, job: NewJob) -> Admission | None:
        return await self._admit(job, looks=True)

    async def job(self, job_id: str) -> JobView:
        fields = await self._calls.command("HGETALL", self._keys.job(job_id))
        if not fields:
            raise NotFoundError(f"no job {job_id}; it never was, or it ended more than an hour ago")
        return job_from(job_id, fields)

    async def jobs(self, *, tenant: str = "", after: JobPlace | None = None, count: int = 100) -> list[JobView]:
        found: list[JobView] = []
        # More than one round only where there are many, or where some were reaped between the two reads.
        while len(found) < count:
            places = await self._places(tenant, after, min(_PAGE, count - len(found)))
            if not places:
                break
            found += await self._views([place.id for place in places])
            after = places[-1]
        return found

    async def result(self, ref: ImageRef) -> bytes | None:
        data: bytes | None = await self._calls.command("GET", self._keys.result(ref.job_id, ref.index))
        return data

    async def mark_delivered(self, job_id: str) -> None:
        await self._calls.script("delivered", job_id)

    async def cancel(
        self, job_id: str, *, state: JobState = JobState.CANCELLED, failure: Failure | None = None
    ) -> bool:
        if not state.terminal:
            raise ValueError(f"state: got {state!r}; allowed: a terminal one")
        why = failure or Failure("CANCELLED", "the job was cancelled")
        answer = await self._calls.script("cancel", job_id, state.value, why.code, why.message, why.stage)
        # All of the job has ended, so that no call of its workers will put these down.
        self.put_down(
            [entry for held in self._in_hand.values() for entry in held.values() if entry.ref.job_id == job_id]
        )
        if answer == -1:
            raise NotFoundError(f"no job {job_id}; it never was, or it ended more than an hour ago")
        return bool(answer)

    async def renew_watch(self, job_id: str) -> None:
        await self._calls.script("watch", job_id)

    async def queue_position(self, job_id: str) -> QueuePosition:
        found = await self._calls.script("position", job_id)
        if found is None:
            raise NotFoundError(f"no job {job_id}; it never was, or it ended more than an hour ago")
        ahead, estimate_s = found
        return QueuePosition(None if ahead < 0 else ahead, float(estimate_s) if estimate_s else None)

    async def expected_s(self, works: Sequence[float], *, num_images: int) -> list[float | None]:
        found = await self._calls.script("expected", num_images, *works)
        return [float(seconds) if seconds else None for seconds in found]

    @asynccontextmanager
    async def subscribe(self, job_id: str) -> AsyncIterator[AsyncIterator[bytes | None]]:
        async with self._events.listen(self._keys.events(job_id)) as queue:
            yield follow(queue)

    async def reap(self) -> int:
        touched: int = await self._calls.script("reap", _REAP_AT_ONCE)
        return touched

    async def take_ended(self) -> list[EndedJob]:
        found = [part.decode() for part in await self._calls.script("ended")]
        return [
            EndedJob(id_, JobState(state), float(took_s)) for id_, state, took_s in zip(*[iter(found)] * 3, strict=True)
        ]

    async def dead_letters(self, *, tenant: str, count: int = 100) -> list[DeadLetter]:
        entries = await self._calls.command("XREVRANGE", self._keys.dead, "+", "-", "COUNT", self._policy.max_dead)
        letters = [letter for letter in map(dead_letter_from, entries) if letter is not None]
        return [letter for letter in letters if letter.tenant == tenant][:count]

    async def remove_dead_letter(self, letter_id: str) -> None:
        await self._calls.command("XDEL", self._keys.dead, letter_id)

    # -- workers -----------------------------------------------------------------------------------------------------

    async def read(self, stage: Stage, worker_id: str, count: int, *, block_s: float = 1.0) -> list[Entry]:
        if count < 1:
            raise ValueError(f"count: got {count}; allowed: 1 or more")
        in_hand = self._in_hand.setdefault(worker_id, {})
        until_s = time.monotonic() + min(block_s, _MAX_BLOCK_S)
        entries, seen = await self._take(stage, worker_id, count, in_hand)
        # Somebody else may be faster, or what came may not be an image's entry.
        while not entries and await self._more(stage, seen, until_s - time.monotonic()):
            entries, seen = await self._take(stage, worker_id, count, in_hand)
        in_hand.update((entry.id, entry) for entry in entries)
        return entries

    @asynccontextmanager
    async def ended_jobs(self) -> AsyncIterator[AsyncIterator[str | None]]:
        async with self._events.listen(self._keys.ended_jobs) as queue:
            yield (None if job_id is None else job_id.decode() async for job_id in follow(queue))

    async def spec(self, job_id: str) -> bytes:
        spec: bytes | None = await self._calls.command("HGET", self._keys.job(job_id), "spec")
        if spec is None:
            raise NotFoundError(f"no job {job_id}")
        return spec

    async def advance(self, entry: Entry, to: Stage, payload: Payload, *, warnings: Sequence[str] = ()) -> bool:
        done = await self._calls.script(
            "advance",
            entry.ref.job_id,
            entry.ref.index,
            entry.stage.value,
            entry.id,
            self._holder(entry),
            to.value,
            len(warnings),
            *warnings,
            *payload_args(payload),
        )
        self.put_down([entry])
        return bool(done)

    async def finish(self, entry: Entry, result: bytes | Failure) -> bool:
        what: tuple[str | bytes, ...] = (
            (result.code, result.message, result.stage) if isinstance(result, Failure) else (result,)
        )
        where = (entry.ref.job_id, entry.ref.index, entry.stage.value, entry.id, self._holder(entry))
        done = await self._calls.script("finish", *where, *what)
        self.put_down([entry])
        return bool(done)

    async def heartbeat(self, stage: Stage, worker_id: str, entries: Iterable[Entry]) -> Heartbeat:
        args = [arg for entry in entries for arg in (entry.id, entry.ref.job_id, entry.ref.index)]
        reply = await self._calls.script("heartbeat", stage.value, worker_id, *args)
        return Heartbeat(*(frozenset(entry_id.decode() for entry_id in ids) for ids in reply))

    def put_down(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            for in_hand in self._in_hand.values():
                # It may have been handed back and taken anew meanwhile.
                if in_hand.get(entry.id) is entry:
                    del in_hand[entry.id]

    async def hand_back(
        self, stage: Stage, worker_id: str, entries: Iterable[Entry] | None, *, count_attempt: bool
    ) -> int:
        given = None if entries is None else list(entries)
        if given == []:
            return 0
        ids = [entry.id for entry in given or ()]
        count: int = await self._calls.script("hand_back", stage.value, worker_id, int(count_attempt), *ids)
        if given is None:
            self._in_hand.pop(worker_id, None)
        else:
            self.put_down(given)
        return count

    async def put_blob(self, data: bytes, *, keep_s: float, admitted: bool = False) -> str:
        sha256 = blob_name(data)
        args = (sha256, int(keep_s * 1000), int(admitted))
        if not await self._calls.script("blob", *args):
            await self._calls.script("blob", *args, data)
        return sha256

    async def get_blob(self, sha256: str) -> bytes | None:
        data: bytes | None = await self._calls.command("GET", self._keys.blob(sha256))
        return data

    async def put_cached(self, key: str, data: bytes, *, keep_s: float) -> None:
        await self._calls.script("cached", key, keep_s, data)

    async def get_cached(self, key: str, *, keep_s: float) -> bytes | None:
        value: bytes | None = await self._calls.script("cached", key, keep_s)
        return value

    async def publish(self, job_id: str, event: bytes) -> None:
        await self._calls.command("PUBLISH", self._keys.events(job_id), event)

    async def push_preview(self, task: PreviewTask) -> None:
        fields = ("job", task.ref.job_id, "index", task.ref.index, "step", task.step, *payload_args(task.payload))
        try:
            await self._calls.command("XADD", self._keys.preview, "MAXLEN", self._policy.max_previews, "*", *fields)
        except BusyError:
            return  # a preview is the first thing to do without

    async def pop_preview(self) -> PreviewTask | None:
        entry = await self._calls.script("pop_preview")
        try:
            return None if entry is None else preview_from(entry[1])
        except (KeyError, ValueError):
            log.warning("an entry of %s is not a preview", self._keys.preview)
            return None

    # -- everybody ---------------------------------------------------------------------------------------------------

    async def register(self, worker: WorkerInfo, *, lease_s: float) -> None:
        await self._calls.script("register", worker.worker_id, lease_s, worker_text(worker))

    async def unregister(self, worker_id: str) -> None:
        await self._calls.script("unregister", worker_id)

    async def workers(self) -> list[WorkerInfo]:
        seconds, microseconds = await self._calls.command("TIME")
        found = await self._calls.command("HVALS", self._keys.workers)
        now_s = int(seconds) + int(microseconds) / 1e6
        said = [known for known in map(worker_from, found) if known is not None]
        return [worker for worker, lapses_s in said if lapses_s > now_s]

    async def lease_gpu(self, holder: str, gpus: Sequence[str], *, weight: float, lease_s: float) -> str:
        if not gpus:
            raise ValueError("gpus: got none; allowed: 1 or more")
        gpu: bytes = await self._calls.script("lease_gpu", holder, weight, lease_s, *gpus)
        return gpu.decode()

    async def free_gpu(self, holder: str) -> None:
        await self._calls.script("free_gpu", holder)

    async def backlog(self, revision: str | None = None) -> dict[str, int]:
        waiting = await self._calls.command("ZCARD", self._keys.waiting)
        streams = {stage.value: self._keys.stream(stage, revision) for stage in Stage}
        lengths = {place: await self._calls.command("XLEN", stream) for place, stream in streams.items()}
        return {"waiting": waiting, **lengths}

    async def overview(self) -> Overview:
        return overview_from(await self._calls.script("overview", _MOST_LOOKED_AT))

    async def ping(self) -> None:
        # Changes nothing, but is refused wherever writes are.
        await self._calls.command("HDEL", self._keys.meta, "_")

    async def close(self) -> None:
        await self._events.close()
        await self._client.aclose()

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _admit(self, job: NewJob, *, looks: bool) -> Admission | None:
        """None where it only looked and there was nothing to say."""
        answer, *details = await self._calls.script(
            "admit",
            job.id,
            job.digest,
            job.spec,
            job.num_images,
            job.tenant,
            job.timeout_s,
            job.priority,
            job.work,
            job.reserved_bytes // job.num_images,
            "" if job.watch_lease_s is None else job.watch_lease_s,
            job.traceparent,
            job.nonce,
            self._limits.max_jobs,
            self._limits.jobs_of(job.quota),
            self._limits.max_reserved_bytes,
            "" if (of_tenant := self._limits.max_tenant_reserved_bytes) is None else of_tenant,
            self._limits.images_per_minute_of(job.quota),
            int(looks),
            *(part for blob in job.blobs.items() for part in blob),
        )
        if answer == b"exists":
            raise AlreadyExistsError(f"a different request has the id {job.id} already; use another id")
        if answer == b"busy":
            raise busy(details[1].decode(), retry_after_s=float(details[0]))
        if answer == b"late":
            raise too_late(float(details[1]), left_s=job.timeout_s)
        return None if answer == b"open" else Admission(answer == b"attached", *map(float, details))

    async def _places(self, tenant: str, after: JobPlace | None, count: int) -> list[JobPlace]:
        index = self._keys.jobs(tenant)
        at = "inf" if after is None else repr(after.admitted_at_s)
        # Jobs of the same microsecond are in the order of their ids.
        same = await self._calls.command("ZREVRANGEBYSCORE", index, at, at, "WITHSCORES")
        older = await self._calls.command("ZREVRANGEBYSCORE", index, f"({at}", "-inf", "WITHSCORES", "LIMIT", 0, count)
        places = places_from(same + older)
        return [place for place in places if after is None or place < after][:count]

    async def _views(self, names: list[str]) -> list[JobView]:
        with redis_errors():
            async with self._client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.hgetall(self._keys.job(name))
                hashes = await pipeline.execute()
        return [job_from(name, fields) for name, fields in zip(names, hashes, strict=True) if fields]

    async def _take(
        self, stage: Stage, worker_id: str, count: int, in_hand: Collection[str]
    ) -> tuple[list[Entry], bytes | None]:
        """Entries for the worker, and up to which id the group has read; None while the worker may read no more."""
        lease_ms, deliveries = int(self._policy.lease_s * 1000), self._policy.max_deliveries
        now_s, taken, seen, leaves_fresh = await self._calls.script(
            "take", stage.value, stage.service, worker_id, count, lease_ms, deliveries, *in_hand
        )
        entries = [entry_from(stage, delivery, now_s=float(now_s)) for delivery in taken_by_script(taken)]
        return entries, None if leaves_fresh else seen

    async def _more(self, stage: Stage, seen: bytes | None, block_s: float) -> bool:
        """Waits until the stream has an entry after `seen`; only the script gives entries out, as it checks them."""
        if block_s <= 0:
            return False
        if seen is None:
            await asyncio.sleep(min(block_s, _SUSPECTS_S))
            return True
        call = ("XREAD", "COUNT", 1, "BLOCK", max(1, int(block_s * 1000)), "STREAMS", self._keys.stream(stage), seen)
        return bool(await self._calls.command(*call))

    def _holder(self, entry: Entry) -> str:
        """The worker that was given it; empty once it was put down."""
        return next((worker for worker, held in self._in_hand.items() if held.get(entry.id) is entry), "")
