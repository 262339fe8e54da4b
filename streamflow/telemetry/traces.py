"""OpenTelemetry traces: one for each request, from the client through the gateway to every stage.

The context travels as W3C `traceparent`: in the metadata of a call, and in the stream entries of its images. Where a
process makes no spans of its own it passes on what it was given.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamflow.errors import InvalidRequestError, UnavailableError, install
from streamflow.telemetry.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

TRACEPARENT = "traceparent"

Attributes = Mapping[str, str | int | float | bool]
Event = tuple[float, str, Attributes]
"""When, in seconds since 1970; what; and about it."""

_log = get_logger(__name__)

_FORM = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TO_FILE = "file:"

CLOSE_S = 3.0
"""How long the end of a process waits for what was not sent; the exporter would wait longer than who ends it."""


@dataclass(frozen=True, slots=True)
class Request:
    """The span of a call.

    Attributes:
        traceparent: of what is done for it; empty = nobody traces.
    """

    traceparent: str
    _span: Span | None = None

    def about(self, attributes: Attributes) -> None:
        """Adds to what the span says."""
        if self._span is not None:
            self._span.set_attributes(attributes)


class Tracing:
    """The spans of one process.

    Args:
        provider: None = it makes none.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("streamflow") if provider else None

    @contextmanager
    def request(self, name: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[Request]:
        """A span around a call, below that of its caller where there is one.

        Args:
            metadata: of the call.
        """
        given = traceparent_in(metadata)
        if self._tracer is None:
            yield Request(given)
            return
        from opentelemetry.trace import SpanKind

        parent = _context(given)
        with self._tracer.start_as_current_span(name, context=parent, kind=SpanKind.SERVER) as span:
            yield Request(_traceparent(span), span)

    def work(
        self,
        name: str,
        *,
        traceparent: str,
        began_s: float,
        took_s: float,
        attributes: Attributes,
        events: Iterable[Event] = (),
        failed: bool = False,
    ) -> None:
        """A span of what is over, below that of `traceparent`. Times are in seconds since 1970."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind, StatusCode

        span = self._tracer.start_span(
            name,
            context=_context(traceparent),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            start_time=_ns(began_s),
        )
        for at_s, event, about in events:
            span.add_event(event, about, timestamp=_ns(at_s))
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(_ns(began_s + took_s))

    def close(self) -> None:
        """Sends what has not been sent, as far as that can be done in CLOSE_S."""
        if self._provider is not None:
            closing = threading.Thread(target=self._provider.shutdown, name="last traces", daemon=True)
            closing.start()
            closing.join(CLOSE_S)
            if closing.is_alive():
                _log.warning("traces are lost", reason=f"nobody took the last of them in {CLOSE_S:g} s")


def open_tracing(target: str, *, service: str, ratio: float = 1.0) -> Tracing:
    """The tracing of a process.

    Args:
        target: an OTLP endpoint over gRPC, such as http://collector:4317; or file:PATH, to which spans are appended as
            JSON, one a line; empty = no spans.
        service: the name of the process in the trace.
        ratio: of the requests that nobody traces yet, how many are traced.

    Raises:
        InvalidRequestError: neither an endpoint nor a file that can be written.
        UnavailableError: the library is not installed.
    """
    if not target:
        return Tracing()
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ModuleNotFoundError as error:
        raise UnavailableError(f"traces need {error.name}; {install('gateway')}") from error
    exporter = _exporter(target)
    provider = TracerProvider(
        resource=Resource.create({SERVICE_NAME: f"streamflow-{service}"}),
        sampler=ParentBasedTraceIdRatio(ratio),
        # `close` does it, and does not wait for ever.
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    return Tracing(provider)


def traceparent_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """What a caller says of its trace; empty for nothing, and for what is not of its form."""
    said = next((value for key, value in metadata or () if key == TRACEPARENT), "")
    return said if isinstance(said, str) and _FORM.fullmatch(said) else ""


def current_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata for a call from within a span of the application; empty where it has none, or no OpenTelemetry."""
    try:
        from opentelemetry.trace import get_current_span
    except ModuleNotFoundError:
        return ()
    span = get_current_span()
    return ((TRACEPARENT, _traceparent(span)),) if span.get_span_context().is_valid else ()


def _exporter(target: str) -> SpanExporter:
    if target.startswith(_TO_FILE):
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        path = Path(target.removeprefix(_TO_FILE))
        try:
            # Appended line by line, so that several processes can share it.
            file = path.open("a", encoding="utf-8")
        except OSError as error:
            why = error.strerror or ""
            raise InvalidRequestError("traces", target, "file:PATH of a file that can be written", why) from error

        class Appending(ConsoleSpanExporter):
            def shutdown(self) -> None:
                file.close()

        return Appending(out=file, formatter=lambda span: span.to_json(indent=None) + "\n")
    if not target.startswith(("http://", "https://")):
        raise InvalidRequestError("traces", target, "an OTLP endpoint such as http://collector:4317, or file:PATH")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=target, insecure=target.startswith("http://"))


def _context(traceparent: str) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    # Below nothing else: whatever span happens to be current is not the caller's.
    return TraceContextTextMapPropagator().extract({TRACEPARENT: traceparent}, context=Context())


def _traceparent(span: Span) -> str:
    about = span.get_span_context()
    return f"00-{about.trace_id:032x}-{about.span_id:016x}-{about.trace_flags:02x}"


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
