"""Every error that StreamFlow raises on purpose.

    StreamFlowError
    ├── InvalidRequestError     the caller's mistake: names the field, the value and what is allowed
    ├── NotFoundError           no such job, image or model
    ├── AlreadyExistsError      the id is taken by a different request
    ├── BusyError               refused for load; says when to try again
    ├── UnauthenticatedError    no key, or a wrong one
    │   └── PermissionDeniedError   a known key, and a call that it does not open
    ├── UnavailableError        a service or Redis cannot be reached now; the same call may succeed later
    ├── JobCancelledError       the job was cancelled
    ├── DeadlineError           the job's deadline passed
    └── GenerationError         a stage could not make the picture

`code` is the name of the gRPC status that carries the error; `rpc.errors` translates both ways, in one place.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import ClassVar


class StreamFlowError(Exception):
    """Base of all; `str(error)` is one sentence that a user can act on.

    Attributes:
        answered: at a client: a StreamFlow server said so, rather than gRPC for want of one.
        for_clients: what a server tells its clients in place of `str(error)`, which is for its operators; empty = that.
    """

    code: ClassVar[str] = "UNKNOWN"
    answered = False
    for_clients = ""


class InvalidRequestError(StreamFlowError, ValueError):
    """A value that cannot be used.

    Args:
        field: name of the request's field.
        given: the value, shortened if it is long.
        allowed: what may be given instead, such as "1 to 100".
        hint: what to do, where that does not follow from `allowed`.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, given: object, allowed: str, hint: str = "") -> None:
        self.field, self.given, self.allowed, self.hint = field, shorten(given), allowed, hint
        super().__init__(f"{field}: got {self.given}; allowed: {allowed}" + (f"; {hint}" if hint else ""))


class NotFoundError(StreamFlowError, LookupError):
    code = "NOT_FOUND"


class AlreadyExistsError(StreamFlowError):
    code = "ALREADY_EXISTS"


class BusyError(StreamFlowError):
    """Refused for load.

    Args:
        retry_after_s: when trying again is worth while.
        reason: one word for counters, where it is known.
    """

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, reason: str = "") -> None:
        self.retry_after_s, self.reason = retry_after_s, reason
        super().__init__(message)


class UnauthenticatedError(StreamFlowError):
    code = "UNAUTHENTICATED"


class PermissionDeniedError(UnauthenticatedError):
    code = "PERMISSION_DENIED"


class UnavailableError(StreamFlowError, ConnectionError):
    code = "UNAVAILABLE"


class JobCancelledError(StreamFlowError):
    code = "CANCELLED"


class DeadlineError(StreamFlowError, TimeoutError):
    code = "DEADLINE_EXCEEDED"


class GenerationError(StreamFlowError):
    """A stage could not make the picture.

    Args:
        stage: encoder, denoiser or decoder.
    """

    code = "INTERNAL"

    def __init__(self, message: str, *, stage: str = "") -> None:
        self.stage = stage
        super().__init__(message)


NOT_FINITE = "the latents are not finite; a lower guidance_scale or float32 (--dtype) may help"
"""Of a GenerationError, wherever it is noticed."""


def install(extra: str) -> str:
    """What to do where an extra of this package is missing. On PyPI its name is another project's."""
    return f"in a clone of the repository: pip install '.[{extra}]'"


def first_of(group: ExceptionGroup[StreamFlowError]) -> StreamFlowError:
    """One error to tell of in place of those of several tasks."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, ExceptionGroup) else first


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)`, with its middle left out where it is longer than `limit` characters. Paths stay whole."""
    if isinstance(value, PurePath):
        return repr(str(value))
    # A prompt of a million characters must not be copied just to be cut.
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[: limit // 2]!r}... ({len(value)} {'characters' if isinstance(value, str) else 'bytes'})"
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 4 :]}"
