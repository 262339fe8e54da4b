"""Between StreamFlowError and gRPC status: the one place, for servers and clients, unary calls and streams alike.

A refusal carries its parts (the field, what is allowed, when to try again) as JSON in the trailing metadata
`streamflow-error-bin`, so that the client raises the same exception that the server raised.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio

from streamflow.errors import (
    AlreadyExistsError,
    BusyError,
    DeadlineError,
    GenerationError,
    InvalidRequestError,
    JobCancelledError,
    NotFoundError,
    PermissionDeniedError,
    StreamFlowError,
    UnauthenticatedError,
    UnavailableError,
)
from streamflow.telemetry.logs import Sparing

DETAIL_KEY = "streamflow-error-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
NEUTRAL_MESSAGE = "internal error; the server's log has the details"

# gRPC refuses more than 8 KiB of metadata in one call, and a message outside ASCII travels at three times its length.
_MAX_MESSAGE_BYTES = 1200
_MAX_DETAIL_BYTES = 2048

_log = logging.getLogger(__name__)
_unanswered = Sparing()

_CLASSES: Mapping[str, type[StreamFlowError]] = {
    "NOT_FOUND": NotFoundError,
    "ALREADY_EXISTS": AlreadyExistsError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": JobCancelledError,
    "DEADLINE_EXCEEDED": DeadlineError,
}


@asynccontextmanager
async def rpc_errors(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the call with the status of whatever StreamFlowError leaves the block.

    Anything else becomes INTERNAL with a neutral message; its traceback goes to the log and nowhere else.
    """
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        await abort(context, _innermost(error))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """Ends the call with the status that belongs to `error`; raises grpc.aio.AbortError to unwind the handler."""
    if not isinstance(error, StreamFlowError):
        _log.error("unexpected error in a call", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, NEUTRAL_MESSAGE)
    # How often that happens is up to who calls.
    if error.for_clients and (left_out := _unanswered.turn()) is not None:
        _log.warning("a call cannot be answered%s: %s", f" ({left_out} more since)" if left_out else "", error)
    await context.abort(status_of(error), _cut(error.for_clients or str(error)), _trailers(error))


def status_of(error: StreamFlowError) -> grpc.StatusCode:
    """The status that carries `error`; the base class has none of its own and counts as INTERNAL."""
    return grpc.StatusCode.INTERNAL if error.code == "UNKNOWN" else grpc.StatusCode[error.code]


def from_rpc_error(error: grpc.RpcError) -> StreamFlowError:
    """The exception that the server raised, as far as the status tells; the message is kept.

    Args:
        error: of a synchronous or an asyncio call.
    """
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    metadata: Iterable[Any] = error.trailing_metadata() or ()
    detail = _detail(metadata)
    if code is grpc.StatusCode.CANCELLED and not detail:
        # No job was cancelled: a server that shuts down ends calls that it had not begun in this way.
        return UnavailableError(f"the call was broken off: {message}")
    translated = from_status(code.name, message, detail)
    # Our servers send details with what they refuse; gRPC itself does not.
    translated.answered = bool(detail)
    return translated


def from_status(code: str, message: str, detail: Mapping[str, Any] | None = None) -> StreamFlowError:
    """The exception for a gRPC status by name, such as the code of a job's Failure.

    Args:
        detail: parts of the refusal: field, given, allowed, hint, retry_after_s, stage.
    """
    detail = detail or {}
    match code:
        case "INVALID_ARGUMENT" | "OUT_OF_RANGE":
            return _invalid(message, detail)
        case "RESOURCE_EXHAUSTED" if "larger than max" in message:
            return _invalid(f"message too large: {message}", {})
        case "RESOURCE_EXHAUSTED":
            return BusyError(message, retry_after_s=_seconds(detail.get("retry_after_s")))
        case "INTERNAL":
            return GenerationError(message, stage=str(detail.get("stage", "")))
        case _ if code in _CLASSES:
            return _CLASSES[code](message)
        case _:
            return StreamFlowError(f"{code}: {message}")


def _invalid(message: str, detail: Mapping[str, Any]) -> InvalidRequestError:
    # Not through __init__, which would compose the message (and quote the value) a second time.
    error = InvalidRequestError.__new__(InvalidRequestError, message)
    error.args = (message,)
    error.field, error.given = str(detail.get("field", "")), str(detail.get("given", ""))
    error.allowed, error.hint = str(detail.get("allowed", "")), str(detail.get("hint", ""))
    return error


def _innermost(error: Exception) -> Exception:
    """What went wrong inside task groups: the first StreamFlowError, if all that failed were such."""
    while isinstance(error, ExceptionGroup):
        unexpected = error.split(StreamFlowError)[1]
        error = (unexpected or error).exceptions[0]
    return error


def _trailers(error: StreamFlowError) -> tuple[tuple[str, str | bytes], ...]:
    names = ("field", "given", "allowed", "hint", "retry_after_s", "stage")
    detail = {"code": error.code} | {name: getattr(error, name) for name in names if getattr(error, name, "")}
    data = json.dumps(detail).encode()
    trailers: list[tuple[str, str | bytes]] = []
    if len(data) <= _MAX_DETAIL_BYTES:
        trailers.append((DETAIL_KEY, data))
    if isinstance(error, BusyError):
        trailers.append((PUSHBACK_KEY, str(max(1, round(error.retry_after_s * 1000)))))
    return tuple(trailers)


def _detail(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in metadata:
        if key == PUSHBACK_KEY:
            found.setdefault("retry_after_s", _seconds(value) / 1000)
        elif key == DETAIL_KEY:
            found.update(_parse(value))
    return found


def _parse(value: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(value)
    except ValueError:  # a proxy's or another server's: the message says enough
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _seconds(value: Any) -> float:
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        return 1.0


def _cut(message: str) -> str:
    data = message.encode("utf-8", "replace")
    if len(data) <= _MAX_MESSAGE_BYTES:
        return data.decode()
    return data[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "..."
