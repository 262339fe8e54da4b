"""The client that blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from math import inf
from typing import Any, Self, Unpack

import grpc

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
from streamflow.rpc.channels import open_channel
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2


class Client(BaseClient):
    """A connection to a StreamFlow gateway, for any number of threads; see BaseClient for its arguments.

        with Client("127.0.0.1:50051") as client:
            client.generate("a red circle on a white background", steps=4).save("circle.png")

    Every method raises a StreamFlowError that says what to do.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._channel = open_channel(self._target)
        self._stub: Any = gateway_pb2_grpc.GatewayStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls under way break off."""
        self._channel.close()

    def generate(
        self,
        prompt: str | Sequence[str] = (),
        *,
        timeout_s: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Result:
        """Makes pictures and waits for them; see GenerateOptions.

        Leaving early (Ctrl-C, an exception from `on_event`) cancels the job, unless it was given a request_id:
        then others may wait for it, and it goes on as long as anybody does.

        Args:
            timeout_s: the deadline of the whole request. With time_budget_s it is not sent again after that time,
                whatever this says.
            on_event: called with every event.

        Raises:
            InvalidRequestError, UnauthenticatedError, BusyError, UnavailableError: the request was not accepted.
            GenerationError, JobCancelledError, DeadlineError: it was, and gave no picture.
        """
        session = self._session(prompt, options, timeout_s)
        builder = ResultBuilder()
        with contextlib.closing(self._follow(session)) as events:
            for event in events:
                builder.add(event)
                if on_event is not None:
                    on_event(event)
        return builder.result(session.request_id)

    def stream(
        self, prompt: str | Sequence[str] = (), *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Event]:
        """The same, event by event; the request is sent with the first `next()`.

        After Done, a job without all its pictures raises as `generate` does. Closing the iterator before is leaving
        early, as with `generate`.
        """
        return self._follow(self._session(prompt, options, timeout_s))

    def submit(
        self, prompt: str | Sequence[str] = (), *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Job:
        """Sends a request that goes on without its client; `watch` fetches the pictures."""
        request = build_request(prompt, detach=True, **options)
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return Job.from_pb(self._call(self._stub.Submit, request, timeout_s=timeout_s, within_s=budget_s(request)))

    def watch(self, request_id: str, *, timeout_s: float | None = None) -> Generator[Event]:
        """The events of any job from now on, images that are already there included; leaving it does not cancel."""
        return self._follow(self._watching(request_id, timeout_s))

    def job(self, request_id: str) -> Job:
        """Raises NotFoundError."""
        return Job.from_pb(self._call(self._stub.GetJob, job_request(request_id)))

    def cancel(self, request_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Job:
        """Ends a job, whoever waits for it; a finished one stays as it is. Raises NotFoundError."""
        return Job.from_pb(self._call(self._stub.Cancel, cancel_request(request_id), timeout_s=timeout_s))

    def jobs(self, *, limit: int = 100) -> list[Job]:
        """The newest jobs, newest first."""
        jobs: list[Job] = []
        page: gateway_pb2.ListJobsRequest | None = job_page(limit)
        while page is not None:
            page = take_page(jobs, self._call(self._stub.ListJobs, page), limit)
        return jobs

    def dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """What was given up, newest first; the newest 1,000 at most."""
        request = letters_request(limit)
        return [DeadLetter.from_pb(one) for one in self._call(self._stub.ListDeadLetters, request).letters]

    def retry(self, letter_id: str) -> Job:
        """Submits the request of a dead letter once more, as a job of its own. Raises NotFoundError."""
        return Job.from_pb(self._call(self._stub.RetryDeadLetter, retry_request(letter_id)))

    def models(self) -> list[Model]:
        answer = self._call(self._stub.ListModels, gateway_pb2.ListModelsRequest())
        return [Model.from_pb(model) for model in answer.models]

    def status(self, *, timeout_s: float = CALL_TIMEOUT_S) -> Status:
        """The stages behind the gateway."""
        return Status.from_pb(self._call(self._stub.Status, types_pb2.StatusRequest(), timeout_s=timeout_s))

    def _call(self, method: Any, request: Any, *, timeout_s: float = CALL_TIMEOUT_S, within_s: float = inf) -> Any:
        retry = self._retry(timeout_s)
        while True:
            try:
                with self._told_when_closed():
                    answer = method(request, timeout=retry.remaining_s, metadata=self._metadata)
                retry.heard()
                return answer
            except grpc.RpcError as error:
                delay_s = retry.delay_s(client_error(error), within_s=within_s)
            time.sleep(delay_s)

    def _follow(self, session: Session) -> Generator[Event]:
        try:
            while not session.finished:
                with self._told_when_closed():
                    call = session.open(self._stub, self._metadata)
                error = None
                try:
                    for message in call:
                        yield from session.feed(message)
                except grpc.RpcError as broken:
                    error = client_error(broken)
                finally:
                    call.cancel()
                if not session.finished:
                    time.sleep(session.retry_in_s(error))
            session.check()
        finally:
            if session.abandoned:
                self._cancel_quietly(session.request_id)

    @contextlib.contextmanager
    def _told_when_closed(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            # What gRPC raises for a call on a closed channel.
            raise UnavailableError(CLOSED) from error

    def _cancel_quietly(self, request_id: str) -> None:
        # Its best effort: where the server cannot be told, the job's watch lease runs out.
        with contextlib.suppress(grpc.RpcError, UnavailableError), self._told_when_closed():
            request = cancel_request(request_id)
            self._stub.Cancel(request, timeout=CANCEL_TIMEOUT_S, metadata=self._metadata)
