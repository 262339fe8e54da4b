"""One request as its client sees it, whatever happens to the connection. No I/O: `Client` and `AsyncClient` drive it.

while not session.finished:
    call = session.open(stub, metadata)      # Generate, or Watch once the request is known to be admitted
    for each message of the call:            events = session.feed(message)
    when the call breaks:                    wait session.retry_in_s(error), then open again
session.check()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from streamflow.client.events import (
    Accepted,
    Done,
    Event,
    ImageInfo,
    ImageReady,
    Preview,
    Progress,
    RequestWarning,
    small_event,
)
from streamflow.client.request import budget_s
from streamflow.client.retry import Retry
from streamflow.errors import NotFoundError, StreamFlowError, UnavailableError
from streamflow.rpc.errors import from_status
from streamflow.types import JobState
from streamflow.v1 import gateway_pb2, types_pb2

Metadata = Sequence[tuple[str, str]]

_FAILURE_CODES = {JobState.ERROR: "INTERNAL", JobState.CANCELLED: "CANCELLED", JobState.DEADLINE: "DEADLINE_EXCEEDED"}


class Session:
    """Every image comes out once, and so does every warning, however often the session re-attaches.

    Its time runs from the first `open`. A request with a time budget is not sent again once that is over.

    Args:
        request: sent until it is admitted; None only watches `request_id`, and leaves the job alone when left.
        shared: the id was chosen outside, so others may send or watch the same: then the job is left alone too.
    """

    def __init__(
        self,
        request_id: str,
        retry: Retry,
        *,
        request: types_pb2.GenerateRequest | None = None,
        shared: bool = False,
    ) -> None:
        self.request_id = request_id
        self._request, self._retry, self._shared = request, retry, shared
        self._opened = False
        self._admitted = False
        self._given_up = False
        self._expected: int | None = None
        self._parts: dict[int, bytearray] = {}
        self._received: set[int] = set()
        self._warned: set[RequestWarning] = set()
        self._done: Done | None = None

    def __repr__(self) -> str:
        state = self._done.state if self._done else "admitted" if self._admitted else "new"
        return f"<Session {self.request_id} {state}, {len(self._received)} of {self._expected or '?'} images>"

    @property
    def finished(self) -> bool:
        return self._done is not None

    @property
    def abandoned(self) -> bool:
        """Whether leaving now leaves a job behind that nobody else can know of: then it should be cancelled."""
        mine = self._request is not None and not self._shared
        return mine and self._opened and not self.finished and not self._given_up

    def open(self, stub: Any, metadata: Metadata) -> Any:
        """Begins the next call; the stub may be a synchronous or an asyncio one."""
        self._parts.clear()
        if not self._opened:
            self._opened = True
            self._retry.start()
        timeout_s = self._retry.remaining_s
        if self._request is not None and not self._admitted:
            return stub.Generate(self._request, timeout=timeout_s, metadata=metadata)
        return stub.Watch(gateway_pb2.WatchRequest(request_id=self.request_id), timeout=timeout_s, metadata=metadata)

    def feed(self, message: gateway_pb2.GenerateEvent) -> Iterator[Event]:
        """The events that a message completes: one or none."""
        self._retry.heard()
        self._admitted = True
        if message.WhichOneof("event") == "image":
            event: Event | None = self._image(message.image)
        else:
            event = small_event(message)
        if event is not None and self._is_news(event):
            yield event

    def retry_in_s(self, error: StreamFlowError | None = None) -> float:
        """Seconds to wait before `open`; raises the error where trying again is no use.

        Args:
            error: why the call broke; None when it ended as if all was well, but without Done.
        """
        if self._request is not None and self._admitted and isinstance(error, NotFoundError):
            # The server lost its memory: the same id and seed make the same images.
            self._admitted = False
            return 0.0
        if self._request is not None and isinstance(error, NotFoundError):
            # It did so between admitting the request and answering.
            error = UnavailableError(str(error))
            error.answered = True
        try:
            error = error or UnavailableError("the stream ended before the job did")
            # A job that is admitted keeps its budget itself; its pictures may well be fetched later.
            within_s = inf if self._request is None or self._admitted else budget_s(self._request)
            return self._retry.delay_s(error, within_s=within_s)
        except StreamFlowError:
            self._given_up = True
            raise

    def check(self) -> None:
        """Raises what ended the job, unless that was its last image."""
        if self._done is None:
            raise RuntimeError("the session has not finished")
        if self._done.state is not JobState.IMAGES:
            failure = self._done.failure
            code = failure.code if failure and failure.code else _FAILURE_CODES[self._done.state]
            message = failure.message if failure else f"the job ended as {self._done.state}"
            raise from_status(code, message, {"stage": failure.stage if failure else ""})
        if self._expected is not None and len(self._received) < self._expected:
            raise NotFoundError(
                f"{self.request_id}: the server keeps only {len(self._received)} of {self._expected} images"
                " (results are freed some time after they were finished);"
                " send the request again under another id"
            )

    def _is_news(self, event: Event) -> bool:
        match event:
            case Accepted():
                first = self._expected is None
                self._expected = event.num_images
                return first
            case Progress() | Preview():
                return event.index not in self._received
            case RequestWarning():
                news = event not in self._warned
                self._warned.add(event)
                return news
            case Done():
                self._done = event
        return True

    def _image(self, part: gateway_pb2.Image) -> ImageReady | None:
        index = part.info.index
        if index in self._received:
            return None
        data = self._parts.setdefault(index, bytearray()) if part.offset_bytes else bytearray()
        if part.offset_bytes != len(data):
            raise StreamFlowError(f"image {index}: got bytes from {part.offset_bytes}, expected from {len(data)}")
        self._parts[index] = data
        data += part.data
        if len(data) < part.total_bytes:
            return None
        del self._parts[index]
        self._received.add(index)
        return ImageReady(ImageInfo.from_pb(part.info), bytes(data))
