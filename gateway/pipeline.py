"""A job on its way through the transport: submitted, followed, ended."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace

from gateway import admission
from gateway.budget import check_budget, choices, choose
from gateway.decoding import Decoder, InThread
from gateway.story import Story
from streamflow.config import GatewaySettings
from streamflow.errors import (
    AlreadyExistsError,
    BusyError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from streamflow.rpc.auth import Caller
from streamflow.rpc.convert import texts_from_pb
from streamflow.telemetry import Counters, fingerprint, get_logger
from streamflow.transport.base import Admission, DeadLetter, ImageRef, JobView, NewJob, Transport, blob_name
from streamflow.transport.policy import HEADROOM
from streamflow.types import NO_QUOTA, ModelCard, Quota
from streamflow.v1 import gateway_pb2, types_pb2

# The job is read at least so often, whatever is published: notifications are lossy.
_READ_AGAIN_S = 1.0
# Why load is refused: what admit.lua says in words for clients, a store without memory, pictures that wait to be
# decoded, and anything else.
_REFUSED_FOR = ("jobs", "tenant_jobs", "rate", "bytes", "tenant_bytes", "work", "full", "pictures", "other")
_MOST_LETTERS = 1000

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class JobKey:
    """One tenant's job; tenants do not share ids, so none can tell what another one has."""

    tenant: str
    request_id: str

    @property
    def job_id(self) -> str:
        """Its id in the transport. "~" is in no request id and no tenant."""
        return f"{self.tenant}~{self.request_id}" if self.tenant else self.request_id

    @classmethod
    def of(cls, view: JobView) -> JobKey:
        return cls(view.tenant, view.id.rpartition("~")[2])


class Pipeline:
    """What a gateway does with jobs; it keeps nothing of its own, so any gateway can follow any job.

    Args:
        transport: where jobs live.
        card: the model that is served.
        settings: limits and times.
        counters: counts requests and images for the status.
        decoder: reads the images of requests; pipelines of one process share it. None = in a thread of this one.
        on_ended: told of each job that ended while the call that admitted it was there.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        card: ModelCard,
        settings: GatewaySettings,
        counters: Counters,
        decoder: Decoder | None = None,
        on_ended: Callable[[JobView], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._card = card
        self._settings = settings
        self._counters = counters
        self._clock = clock
        self._on_ended = on_ended
        self._decoder = decoder or InThread(max_pixels=settings.max_image_pixels)
        self._stopping = False
        for reason in _REFUSED_FOR:
            counters.add(f"busy_{reason}_total", 0)

    async def drain(self, grace_s: float) -> None:
        """Gives streams the grace period to end, then ends them as UNAVAILABLE: any gateway can go on with them."""
        asyncio.get_running_loop().call_later(grace_s, self._stop)

    def _stop(self) -> None:
        self._stopping = True

    @contextmanager
    def room(self, request: types_pb2.GenerateRequest, *, tenant: str) -> Iterator[None]:
        """Counts the request's pictures as here; to be entered before anything waits for Redis, which may hang.

        Raises:
            BusyError: too many are here.
        """
        with ExitStack() as held:
            try:
                held.enter_context(self._decoder.room(request, tenant=tenant))
            except BusyError as error:
                self._refused(error)
                raise
            yield

    async def submit(
        self,
        request: types_pb2.GenerateRequest,
        *,
        caller: Caller,
        remaining_s: float | None,
        detach: bool,
        traceparent: str = "",
    ) -> tuple[JobKey, bool]:
        """Validates and admits; true when the same request was there already.

        Args:
            traceparent: of the span below which its work is traced; empty = none.

        Raises:
            InvalidRequestError, DeadlineError: it cannot be served.
            AlreadyExistsError, BusyError, UnavailableError: from the transport.
        """
        digest = admission.digest(request)
        if request.HasField("time_budget_s"):
            remaining_s = min(
                request.time_budget_s, self._settings.max_timeout_s if remaining_s is None else remaining_s
            )
        request = await self._within_budget(request, caller.quota)
        seed, request_id = secrets.randbits(64), secrets.token_hex(16)
        filled = admission.fill_in(
            request,
            card=self._card,
            settings=self._settings,
            quota=caller.quota,
            request_id=request_id,
            seed=seed,
        )
        timeout_s = admission.timeout_s(remaining_s, self._settings)
        key = JobKey(caller.tenant, filled.request_id)
        spec = types_pb2.JobSpec(request=filled, model_revision=self._card.revision, tenant=key.tenant)
        new = self._new_job(key, spec, digest=digest, timeout_s=timeout_s, detach=detach, quota=caller.quota)
        new = replace(new, traceparent=traceparent)
        with_images = request.init_image or request.control.image
        admitted = self._admit_with_images(request, spec, new) if with_images else self._transport.admit(new)
        attached = await self._admit(key, admitted)
        texts = "\n".join(texts_from_pb(request))
        prompts = texts if self._settings.log_prompts else fingerprint(texts)
        _log.info("admitted", job=new.id, model=filled.model, attached=attached, images=new.num_images, prompts=prompts)
        return key, attached

    async def dead_letters(self, tenant: str, *, count: int) -> list[DeadLetter]:
        return await self._transport.dead_letters(tenant=tenant, count=count)

    async def retry(self, key: JobKey, letter_id: str, *, quota: Quota = NO_QUOTA) -> None:
        """Admits the job of a dead letter again, as the job `key`; safe to repeat.

        Raises:
            NotFoundError: no such letter.
            InvalidRequestError: what it needs is not there any more.
            BusyError, UnavailableError: from the transport.
        """
        found = await self.dead_letters(key.tenant, count=_MOST_LETTERS)
        letters = {letter.id: letter for letter in found}
        if letter_id not in letters:
            await self._was_retried(key, letter_id)
            return
        spec = types_pb2.JobSpec.FromString(letters[letter_id].spec)
        if spec.model_revision != self._card.revision:
            hint = "send the request again"
            raise InvalidRequestError("id", letter_id, f"a letter of the model served now, {self._card.name}", hint)
        blobs = {}
        for blob in filter(None, (spec.init_image_blob, spec.mask_blob, spec.control_blob)):
            data = await self._transport.get_blob(blob)
            if data is None:
                hint = "send the request again with its images"
                raise InvalidRequestError("id", letter_id, "a letter whose images are still stored", hint)
            blobs[blob] = data
        spec.request.request_id = key.request_id
        timeout_s = self._settings.default_timeout_s
        new = self._new_job(key, spec, digest=letter_id, timeout_s=timeout_s, detach=True, quota=quota)
        await self._admit(key, self._transport.admit(replace(new, blobs=blobs)))
        await self._transport.remove_dead_letter(letter_id)

    async def _was_retried(self, key: JobKey, letter_id: str) -> None:
        try:
            await self._transport.job(key.job_id)
        except NotFoundError as error:
            raise no_letter(letter_id) from error

    def _new_job(
        self, key: JobKey, spec: types_pb2.JobSpec, *, digest: str, timeout_s: float, detach: bool, quota: Quota
    ) -> NewJob:
        request = spec.request
        return NewJob(
            id=key.job_id,
            digest=digest,
            spec=spec.SerializeToString(),
            num_images=admission.num_images(request),
            tenant=key.tenant,
            timeout_s=timeout_s,
            priority=admission.priority(request),
            work=admission.work(request, self._card),
            reserved_bytes=admission.reserved_bytes(request),
            watch_lease_s=None if detach else self._settings.watch_lease_s,
            nonce=secrets.token_hex(8),
            quota=quota,
        )

    async def _admit(self, key: JobKey, admitted: Awaitable[Admission]) -> bool:
        """True when the same job was there already."""
        try:
            attached = (await admitted).attached
        except AlreadyExistsError as error:
            given = f"a different request has the id {key.request_id!r}"
            raise AlreadyExistsError(
                f"request_id: {given} already; use another id, or send the same request"
            ) from error
        except BusyError as error:
            self._refused(error)
            raise
        self._counters.add("attached_total" if attached else "admitted_total")
        return attached

    def _refused(self, error: BusyError) -> None:
        self._counters.add("busy_total")
        self._counters.add(f"busy_{error.reason if error.reason in _REFUSED_FOR else 'other'}_total")

    async def _within_budget(self, request: types_pb2.GenerateRequest, quota: Quota) -> types_pb2.GenerateRequest:
        """The request itself, or with what was chosen for its time budget."""
        if not request.HasField("time_budget_s"):
            return request
        check_budget(request, self._card, self._settings)
        found = choices(request, self._card)
        # The one with the most steps can run if any can: a strength may leave the others without a step.
        most = found[-1].apply(request, None)
        admission.check(most, card=self._card, settings=self._settings, quota=quota)
        works = {choice: admission.work_if_it_runs(choice.apply(request, None), self._card) for choice in found}
        runnable = {choice: work for choice, work in works.items() if work is not None}
        expected_s = await self._transport.expected_s([*runnable.values()], num_images=admission.num_images(request))
        budget_s = request.time_budget_s / HEADROOM
        chosen, decoder = choose([*runnable], expected_s, budget_s=budget_s, card=self._card)
        return chosen.apply(request, decoder)

    async def _admit_with_images(
        self, request: types_pb2.GenerateRequest, spec: types_pb2.JobSpec, new: NewJob
    ) -> Admission:
        """Admits a job whose images are stored with it. Those of one that is refused are not decoded either.

        All of it is one turn, so that of a crowd that comes at once each is told what the ones before it changed.
        """
        came_at_s = self._clock()
        async with self._decoder.turn(request) as prepare:
            left_s = new.timeout_s - (self._clock() - came_at_s)
            if left_s <= 0:
                raise DeadlineError("its time was over before its pictures could be decoded; allow more of it")
            new = replace(new, timeout_s=left_s)
            known = await self._transport.look(new)
            if known is not None:
                return known
            prepared = await prepare(width=spec.request.width, height=spec.request.height)
            for field, data in prepared.items():
                setattr(spec, field, blob_name(data))
            blobs = {blob_name(data): data for data in prepared.values()}
            return await self._transport.admit(replace(new, spec=spec.SerializeToString(), blobs=blobs))

    async def job(self, key: JobKey) -> JobView:
        """Raises NotFoundError, in the words of the client's id."""
        try:
            return await self._transport.job(key.job_id)
        except NotFoundError as error:
            raise NotFoundError(
                f"no job {key.request_id!r}: the id is wrong, or its time to be read is over"
            ) from error

    async def cancel(self, key: JobKey) -> JobView:
        """Ends the job if it still runs; the job as it stands then."""
        await self.job(key)
        if await self._transport.cancel(key.job_id):
            self._counters.add("cancelled_total")
        return await self.job(key)

    @asynccontextmanager
    async def watched(self, key: JobKey) -> AsyncIterator[None]:
        """Keeps the job's watch lease while the context is entered."""
        left = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew(key, left), name=f"watch {key.job_id}")
            try:
                yield
            finally:
                left.set()

    async def _renew(self, key: JobKey, left: asyncio.Event) -> None:
        while not left.is_set():
            try:
                await self._transport.renew_watch(key.job_id)
            except NotFoundError:
                return
            except UnavailableError as error:
                # The follower meets the same and tells the client.
                _log.warning("watch lease not renewed", job=key.job_id, reason=str(error))
            await _set_within(left, self._settings.watch_lease_s / 3)

    async def follow(self, key: JobKey, *, attached: bool) -> AsyncGenerator[gateway_pb2.GenerateEvent, None]:
        """Accepted, then what is and what comes, then Done. Whoever has passed it all on says so: `delivered`.

        Images that have expired since are told of by warnings.

        Close it (`aclosing`) where it is not read to its end.

        Raises:
            NotFoundError: no such job.
            UnavailableError: the transport cannot be reached, or this gateway is shutting down.
        """
        story = Story(key.request_id)
        # Subscribed before the first read, or a change between the two would go unnoticed for a second.
        async with self._transport.subscribe(key.job_id) as wakes:
            view = await self.job(key)
            yield story.accepted(view, attached=attached)
            while True:
                async for event in self._news(key, view, story):
                    yield event
                if view.state.terminal:
                    break
                async for event in self._live(wakes, story):
                    yield event
                view = await self.job(key)
            if not attached and self._on_ended is not None:
                self._on_ended(view)
            yield story.done(view)

    async def delivered(self, key: JobKey) -> None:
        """The client has all: results may go soon. Where that cannot be written down, they stay longer."""
        try:
            await self._transport.mark_delivered(key.job_id)
        except UnavailableError as error:
            _log.warning("not marked as delivered", job=key.job_id, reason=str(error))

    async def _news(self, key: JobKey, view: JobView, story: Story) -> AsyncIterator[gateway_pb2.GenerateEvent]:
        for event in story.warnings(view):
            yield event
        if "waiting" in view.images and not view.state.terminal:
            queued = story.queued(await self._transport.queue_position(key.job_id))
            if queued is not None:
                yield queued
        for index in story.new_images(view):
            stored = await self._transport.result(ImageRef(key.job_id, index))
            for event in story.image(index, stored):
                yield event
            self._counters.add("images_sent_total")

    async def _live(self, wakes: AsyncIterator[bytes | None], story: Story) -> AsyncIterator[gateway_pb2.GenerateEvent]:
        """Published events, until it is time to read the job again."""
        read_at_s = self._clock()
        while self._clock() - read_at_s < _READ_AGAIN_S:
            published = await anext(wakes, None)
            if self._stopping:
                raise UnavailableError("this gateway is shutting down; watch the job through another one")
            if published is None:
                return
            event = story.live(published)
            if event is not None:
                yield event


def no_letter(letter_id: str) -> NotFoundError:
    return NotFoundError(f"no dead letter {letter_id!r}; `streamflow dead list` shows what there is")


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    """Waits for an event, so long at most; whether it came."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
