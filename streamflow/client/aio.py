"""The client for asyncio: the same methods and rules as `Client`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import cached_property
from math import inf
from typing import Any, Self, Unpack

import grpc.aio

from streamflow.client.base import (
    CALL_TIMEOUT_S,
    CANCEL_TIMEOUT_S,
    CLOSED,
    BaseClient,
    cancel_request,
    job_page,
    job_request,
    letters_request,
    retry_request,
    take_page,
)
from streamflow.client.events import Event
from streamflow.client.limits import client_error
from streamflow.client.request import GenerateOptions, budget_s, build_request
from streamflow.client.result import Result, ResultBuilder
from streamflow.client.session import Session
from streamflow.client.views import DeadLetter, Job, Model, Status
from streamflow.errors import UnavailableError
from streamflow.rpc.channels import open_aio_channel
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2


class AsyncClient(BaseClient):
    """A connection to a StreamFlow gateway, for one event loop; see BaseClient for its arguments.

        async with AsyncClient("127.0.0.1:50051") as client:
            result = await client.generate("a red circle on a white background", steps=4)

    Every method raises a StreamFlowError that says what to do.
    """

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Not in __init__: the channel belongs to the loop that runs at its first use.
        return open_aio_channel(self._target)

    @cached_property
    def _stub(self) -> Any:
        return gateway_pb2_grpc.GatewayStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; calls under way break off."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: str | Sequence[str] = (),
        *,
        timeout_s: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Result:
        """Makes pictures and waits for them; see GenerateOptions.

        Leaving early (cancelling the task, an exception from `on_event`) cancels the job, unless it was given a
        request_id: then others may wait for it, and it goes on as long as anybody does.

        Args:
            timeout_s: the deadline of the whole request. With time_budget_s it is not sent again after that time,
                whatever this says.
            on_event: called with every event, between two awaits.

        Raises:
            InvalidRequestError, UnauthenticatedError, BusyError, UnavailableError: the request was not accepted.
            GenerationError, JobCancelledError, DeadlineError: it was, and gave no picture.
        """
        session = self._session(prompt, options, timeout_s)
        builder = ResultBuilder()
        async with contextlib.aclosing(self._follow(session)) as events:
            async for event in events:
                builder.add(event)
                if on_event is not None:
                    on_event(event)
        return builder.result(session.request_id)

    def stream(
        self, prompt: str | Sequence[str] = (), *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event]:
        """The same, event by event; the request is sent when the first event is awaited.

        After Done, a job without all its pictures raises as `generate` does. Closing the iterator before is leaving
        early, as with `generate` (`contextlib.aclosing` closes it at once; otherwise the event loop does, when the
        iterator is collected).
        """
        return self._follow(self._session(prompt, options, timeout_s))

    async def submit(
        self, prompt: str | Sequence[str] = (), *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Job:
        """Sends a request that goes on without its client; `watch` fetches the pictures."""
        request = build_request(prompt, detach=True, **options)
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return Job.from_pb(
            await self._call(self._stub.Submit, request, timeout_s=timeout_s, within_s=budget_s(request))
        )

    def watch(self, request_id: str, *, timeout_s: float | None = None) -> AsyncGenerator[Event]:
        """The events of any job from now on, images that are already there included; leaving it does not cancel."""
        return self._follow(self._watching(request_id, timeout_s))

    async def job(self, request_id: str) -> Job:
        """Raises NotFoundError."""
        return Job.from_pb(await self._call(self._stub.GetJob, job_request(request_id)))

    async def cancel(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Job:
        """Ends a job, whoever waits for it; a finished one stays as it is. Raises NotFoundError."""
        return Job.from_pb(await self._call(self._stub.Cancel, cancel_request(request_id), timeout_s=timeout_s))

    async def jobs(self, *, limit: int = 100) -> list[Job]:
        """The newest jobs, newest first."""
        jobs: list[Job] = []
        page: gateway_pb2.ListJobsRequest | None = job_page(limit)
        while page is not None:
            page = take_page(jobs, await self._call(self._stub.ListJobs, page), limit)
        return jobs

    async def dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """What was given up, newest first; the newest 1,000 at most."""
        request = letters_request(limit)
        return [DeadLetter.from_pb(one) for one in (await self._call(self._stub.ListDeadLetters, request)).letters]

    async def retry(self, letter_id: str) -> Job:
        """Submits the request of a dead letter once more, as a job of its own. Raises NotFoundError."""
        return Job.from_pb(await self._call(self._stub.RetryDeadLetter, retry_request(letter_id)))

    async def models(self) -> list[Model]:
        answer = await self._call(self._stub.ListModels, gateway_pb2.ListModelsRequest())
        return [Model.from_pb(model) for model in answer.models]

    async def status(self, *, timeout_s: float = CALL_TIMEOUT_S) -> Status:
        """The stages behind the gateway."""
        return Status.from_pb(await self._call(self._stub.Status, types_pb2.StatusRequest(), timeout_s=timeout_s))

    async def _call(
        self, method: Any, request: Any, *, timeout_s: float = CALL_TIMEOUT_S, within_s: float = inf
    ) -> Any:
        retry = self._retry(timeout_s)
        while True:
            try:
                with self._told_when_closed():
                    answer = await method(request, timeout=retry.remaining_s, metadata=self._metadata)
                retry.heard()
                return answer
            except grpc.aio.AioRpcError as error:
                delay_s = retry.delay_s(client_error(error), within_s=within_s)
            await asyncio.sleep(delay_s)

    async def _follow(self, session: Session) -> AsyncGenerator[Event]:
        try:
            while not session.finished:
                with self._told_when_closed():
                    call = session.open(self._stub, self._metadata)
                error = None
                try:
                    async for message in call:
                        for event in session.feed(message):
                            yield event
                except grpc.aio.AioRpcError as broken:
                    error = client_error(broken)
                finally:
                    call.cancel()
                if not session.finished:
                    await asyncio.sleep(session.retry_in_s(error))
            session.check()
        finally:
            if session.abandoned:
                await self._cancel_quietly(session.request_id)

    @contextlib.contextmanager
    def _told_when_closed(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.UsageError as error:
            raise UnavailableError(CLOSED) from error

    async def _cancel_quietly(self, request_id: str) -> None:
        # Its best effort: where the server cannot be told, the job's watch lease runs out.
        with contextlib.suppress(grpc.aio.AioRpcError, UnavailableError), self._told_when_closed():
            request = cancel_request(request_id)
            await self._stub.Cancel(request, timeout=CANCEL_TIMEOUT_S, metadata=self._metadata)
