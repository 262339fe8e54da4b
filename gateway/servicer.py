"""The gateway's gRPC surface: thin, one method per call of gateway.proto."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, aclosing
from dataclasses import replace
from typing import Any

import grpc.aio

from gateway.models import Models, Served
from gateway.pipeline import JobKey, Pipeline
from gateway.story import Collected, job_to_pb, letter_to_pb
from streamflow.config import GatewaySettings
from streamflow.errors import InvalidRequestError, NotFoundError, UnavailableError
from streamflow.rpc import convert
from streamflow.rpc.auth import Caller, Keys
from streamflow.rpc.errors import rpc_errors
from streamflow.telemetry import Counters
from streamflow.telemetry.traces import Request, Tracing
from streamflow.transport.base import JobPlace, JobView
from streamflow.types import WorkerInfo
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from streamflow.validation import check_request_id

Context = grpc.aio.ServicerContext[Any, Any]

FOR_TENANTS = frozenset(
    {
        "Generate",
        "GenerateImages",
        "Submit",
        "GetJob",
        "Watch",
        "Cancel",
        "ListJobs",
        "ListModels",
        "ListDeadLetters",
        "RetryDeadLetter",
    }
)
"""What a tenant's key opens: calls that tell it of nobody else. Status counts the work of all tenants."""

REQUEST_ID_KEY = "streamflow-request-id"
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100

# Behind it the name of a model, where that is not the default one.
_LETTER_ID = re.compile(r"[0-9]{1,20}(-[0-9]{1,20})?(\.[A-Za-z0-9_-]{1,40})?")
# When the page's last job was admitted, and its id: a place in the list that stays when the job is gone.
_PAGE_TOKEN = re.compile(r"([0-9]{1,12}\.[0-9]{1,12}):([A-Za-z0-9._-]{1,64})")


class GatewayServicer(gateway_pb2_grpc.GatewayServicer):
    """Translates calls to those of a model's pipeline and its answers back.

    Args:
        models: what is served.
        keys: tell whose call it is.
        tracing: makes a span of each call that admits a job.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        models: Models,
        *,
        settings: GatewaySettings,
        keys: Keys,
        counters: Counters,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models = models
        self._tracing = tracing or Tracing()
        self._settings = settings
        self._keys = keys
        self._counters = counters
        self._clock = clock
        self._started_at_s = clock()

    async def Generate(self, request: types_pb2.GenerateRequest, context: Context) -> None:
        async with rpc_errors(context):
            with self._traced("Generate", context) as call:
                pipeline, key, attached = await self._submit(request, context, call)
                # What it brought is in the store, and the call may be open for as long as its job runs. Clearing its
                # fields would free nothing: a message's memory is one piece.
                del request
                await _stream(pipeline, key, context, attached=attached)

    async def GenerateImages(
        self, request: types_pb2.GenerateRequest, context: Context
    ) -> gateway_pb2.GenerateImagesResponse:
        async with rpc_errors(context):
            with self._traced("GenerateImages", context) as call:
                pipeline, key, attached = await self._submit(request, context, call)
                del request  # as in Generate
                collected = Collected(key.request_id)
                async with pipeline.watched(key), aclosing(pipeline.follow(key, attached=attached)) as events:
                    async for event in events:
                        collected.add(event)
            response = collected.response(max_bytes=self._settings.max_message_bytes)
            # gRPC tells nobody whether a unary answer arrived. One that was refused is still to be read in parts.
            await pipeline.delivered(key)
            return response

    async def Submit(self, request: types_pb2.GenerateRequest, context: Context) -> gateway_pb2.Job:
        async with rpc_errors(context):
            with self._traced("Submit", context) as call:
                pipeline, key, _ = await self._submit(request, context, call, detach=True)
            try:
                return job_to_pb(key.request_id, await pipeline.job(key))
            except NotFoundError as error:
                # Admitted and forgotten: sent again it is the same request.
                raise UnavailableError("the store has lost its memory; send the request again") from error

    async def GetJob(self, request: gateway_pb2.GetJobRequest, context: Context) -> gateway_pb2.Job:
        async with rpc_errors(context):
            pipeline, key = await self._find(request.request_id, context)
            return job_to_pb(key.request_id, await pipeline.job(key))

    async def Watch(self, request: gateway_pb2.WatchRequest, context: Context) -> None:
        async with rpc_errors(context):
            pipeline, key = await self._find(request.request_id, context)
            await _stream(pipeline, key, context, attached=True)

    async def Cancel(self, request: gateway_pb2.CancelRequest, context: Context) -> gateway_pb2.Job:
        async with rpc_errors(context):
            pipeline, key = await self._find(request.request_id, context)
            return job_to_pb(key.request_id, await pipeline.cancel(key))

    async def ListJobs(self, request: gateway_pb2.ListJobsRequest, context: Context) -> gateway_pb2.ListJobsResponse:
        async with rpc_errors(context):
            size = _page_size("page_size", request.page_size)
            tenant = self._tenant(context)
            after = _place(request.page_token, tenant) if request.page_token else None
            # One more than asked for tells whether there is another page.
            views = await self._models.jobs(tenant=tenant, after=after, count=size + 1)
            jobs = [job_to_pb(JobKey.of(view).request_id, view) for view in views[:size]]
            token = _page_token(views[size - 1]) if len(views) > size else ""
            return gateway_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def ListDeadLetters(
        self, request: gateway_pb2.ListDeadLettersRequest, context: Context
    ) -> gateway_pb2.ListDeadLettersResponse:
        async with rpc_errors(context):
            size = _page_size("limit", request.limit)
            letters = await self._models.dead_letters(self._tenant(context), count=size)
            return gateway_pb2.ListDeadLettersResponse(letters=map(letter_to_pb, letters))

    async def RetryDeadLetter(self, request: gateway_pb2.RetryDeadLetterRequest, context: Context) -> gateway_pb2.Job:
        async with rpc_errors(context):
            if not _LETTER_ID.fullmatch(request.id):
                raise InvalidRequestError("id", request.id, "the id of a dead letter, such as 1700000000000-0")
            pipeline, key = await self._models.retry(self._caller(context), request.id)
            return job_to_pb(key.request_id, await pipeline.job(key))

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: Context
    ) -> gateway_pb2.ListModelsResponse:
        async with rpc_errors(context):
            live = await asyncio.gather(*(each.live() for each in self._models))
            models = [convert.card_to_pb(each.card, live=it) for each, it in zip(self._models, live, strict=True)]
            return gateway_pb2.ListModelsResponse(models=models)

    async def Status(self, request: types_pb2.StatusRequest, context: Context) -> gateway_pb2.GatewayStatus:
        async with rpc_errors(context):
            now_s = self._clock()
            answer = gateway_pb2.GatewayStatus(
                model=self._models.default.card.name,
                models=self._models.names,
                uptime_s=now_s - self._started_at_s,
                counters=self._counters.snapshot(),
            )
            for each in self._models:
                await _add_stages(answer, each, now_s=now_s, tenant=self._tenant(context))
            return answer

    async def _submit(
        self, request: types_pb2.GenerateRequest, context: Context, call: Request, *, detach: bool = False
    ) -> tuple[Pipeline, JobKey, bool]:
        pipeline, key, attached = await self._models.submit(
            request,
            caller=self._caller(context),
            remaining_s=context.time_remaining(),
            detach=detach or request.detach,
            traceparent=call.traceparent,
        )
        call.about({"streamflow.job": key.job_id, "streamflow.attached": attached})
        # Headers tell the client that the request is admitted: from here on it watches instead of sending again.
        await context.send_initial_metadata(((REQUEST_ID_KEY, key.request_id),))
        return pipeline, key, attached

    async def _find(self, request_id: str, context: Context) -> tuple[Pipeline, JobKey]:
        check_request_id(request_id)
        key = JobKey(self._tenant(context), request_id)
        return await self._models.having(key), key

    def _traced(self, name: str, context: Context) -> AbstractContextManager[Request]:
        return self._tracing.request(name, context.invocation_metadata())

    def _tenant(self, context: Context) -> str:
        return self._caller(context).tenant

    def _caller(self, context: Context) -> Caller:
        return self._keys.caller(context.invocation_metadata())


async def _stream(pipeline: Pipeline, key: JobKey, context: Context, *, attached: bool) -> None:
    async with pipeline.watched(key), aclosing(pipeline.follow(key, attached=attached)) as events:
        async for event in events:
            await context.write(event)
    await pipeline.delivered(key)


async def _add_stages(answer: gateway_pb2.GatewayStatus, served: Served, *, now_s: float, tenant: str) -> None:
    """What the deployment of one model says; of whom its work is, only where that is the tenant."""
    overview, workers = await served.transport.overview(), await served.transport.workers()
    # Replicas of another revision, which end what is left of it, have streams of their own.
    own, others = served.card.revision, {worker.model_revision for worker in workers} - {served.card.revision}
    backlog = {own: await served.transport.backlog()}
    backlog |= {revision: await served.transport.backlog(revision) for revision in others}
    answer.waiting += backlog[own]["waiting"]
    answer.stages.extend(
        convert.worker_to_pb(
            _seen_by(tenant, worker), backlog=backlog[worker.model_revision][worker.stage], now_s=now_s
        )
        for worker in workers
    )
    answer.queues.extend(
        gateway_pb2.QueueStatus(
            model=served.card.name,
            place=queue.place,
            priority=queue.priority,
            images=queue.images,
            oldest_s=queue.oldest_s,
        )
        for queue in overview.queues
    )


def _seen_by(tenant: str, worker: WorkerInfo) -> WorkerInfo:
    mine = JobKey(tenant, "").job_id
    work = (slot if _is_of(mine, slot.image) else replace(slot, image="") for slot in worker.work)
    return replace(worker, work=tuple(work))


def _is_of(mine: str, image: str) -> bool:
    return image.startswith(mine) if mine else "~" not in image


def _page_size(field: str, size: int) -> int:
    if size > MAX_PAGE_SIZE:
        raise InvalidRequestError(field, size, f"0 (for {DEFAULT_PAGE_SIZE}) to {MAX_PAGE_SIZE}")
    return size or DEFAULT_PAGE_SIZE


def _page_token(last: JobView) -> str:
    return f"{last.admitted_at_s!r}:{JobKey.of(last).request_id}"


def _place(token: str, tenant: str) -> JobPlace:
    """Raises InvalidRequestError for what is no page token."""
    found = _PAGE_TOKEN.fullmatch(token)
    if found is None:
        raise InvalidRequestError("page_token", token, "the next_page_token of the page before, or none")
    return JobPlace(float(found[1]), JobKey(tenant, found[2]).job_id)
