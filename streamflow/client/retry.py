"""When a broken call is made again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from streamflow.client.trouble import hint
from streamflow.errors import BusyError, DeadlineError, JobCancelledError, StreamFlowError, UnavailableError

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 2.0
# A restart of a gateway takes less; a longer absence is worth a line.
_TOLD_AFTER = 5
# Of a gateway that is there, and says that it cannot.
_ANSWER_TOLD_AFTER = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient a client is.

    Attributes:
        address: for messages.
        connect_timeout_s: a server that never answered is given up after so long; one that did, at the deadline.
        max_busy_retries: refusals for load before BusyError is raised; None = until the deadline.
        tls: for messages: whether the client encrypts.
    """

    address: str
    connect_timeout_s: float = 10.0
    max_busy_retries: int | None = None
    tls: bool = False


@dataclass(slots=True)
class Contact:
    """What all calls of one client know of its server: whether it has ever answered."""

    made: bool = False


class Retry:
    """The retries of one call: takes its errors, says how long to wait. It neither sleeps nor calls.

    Args:
        contact: of the client; None = nothing is known yet.
        timeout_s: the call's deadline, from `start`, or from now where that is never called.
        clock: seconds, monotonic.
        jitter: uniform in [0, 1).
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        timeout_s: float,
        contact: Contact | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._policy, self._clock, self._jitter = policy, clock, jitter
        self._timeout_s = timeout_s
        self._started_at_s = clock()
        self._contact = contact or Contact()
        self._answer = self._hint = ""
        self._failures = 0
        self._told = False
        self._refusals = 0

    def start(self) -> None:
        """The time begins to run now: an iterator may be asked for its first event long after it was made."""
        self._started_at_s = self._clock()

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, for the next call; never quite 0, which gRPC would take as none."""
        return max(0.001, self._left_s(self._timeout_s))

    def heard(self) -> None:
        """The server answered: it is there, and the next failure is a new one."""
        self._contact.made, self._answer, self._failures, self._told = True, "", 0, False

    def delay_s(self, error: StreamFlowError, *, within_s: float = inf) -> float:
        """Seconds to wait before the next call; raises what the user should see where there is none.

        Args:
            within_s: no call begins later than this after the first one, however far the deadline is.
        """
        limit_s = min(self._timeout_s, within_s)
        self._contact.made = self._contact.made or error.answered
        match error:
            case BusyError():
                self.heard()
                self._refusals += 1
                limit = self._policy.max_busy_retries
                if limit is not None and self._refusals > limit:
                    raise error from None
                # Never earlier than asked, and not all clients at the same moment.
                return self._within_s(limit_s, error.retry_after_s * (1 + 0.2 * self._jitter()), error)
            # A status CANCELLED is about the call, cut by a server that stops; the job's own state comes as an event.
            case UnavailableError() | JobCancelledError():
                delay_s = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0**self._failures) * (0.5 + 0.5 * self._jitter())
                self._failures += 1
                self._answer = str(error) if error.answered else ""
                enough = self._failures >= (_ANSWER_TOLD_AFTER if error.answered else _TOLD_AFTER)
                if self._contact.made and enough and not self._told:
                    self._told = True
                    _log.warning("%s; trying again until the time is up", self._trouble)
                patience_s = limit_s if self._contact.made else min(self._policy.connect_timeout_s, limit_s)
                return self._within_s(patience_s, delay_s, self._unavailable(error))
            case DeadlineError() if error.answered:
                raise error from None
            case DeadlineError() if not self._contact.made:
                message = f"no StreamFlow gateway answered within {self._timeout_s:g} s"
                raise UnavailableError(f"{self._policy.address}: {message}") from None
            case DeadlineError() if self._failures:
                raise DeadlineError(f"{self._trouble}; given up after {self._timeout_s:g} s in all") from None
            case DeadlineError():
                message = f"not finished within {self._timeout_s:g} s; allow more time (timeout_s, --timeout)"
                raise DeadlineError(message) from None
            case _:
                raise error from None

    @property
    def _trouble(self) -> str:
        """What the last failure was: a gateway that answers is there, whatever it lacks itself."""
        return f"{self._policy.address}: {self._answer}" if self._answer else f"{self._policy.address} does not answer"

    def _left_s(self, limit_s: float) -> float:
        return self._started_at_s + limit_s - self._clock()

    def _within_s(self, limit_s: float, delay_s: float, error: StreamFlowError) -> float:
        if delay_s >= self._left_s(limit_s):
            raise error from None
        return delay_s

    def _unavailable(self, error: StreamFlowError) -> StreamFlowError:
        if error.answered:
            return UnavailableError(f"{self._policy.address}: {error}")
        trouble = "the connection was lost" if self._contact.made else "no StreamFlow gateway answers"
        # Of a name with several addresses gRPC tells what became of one of them, and not always of the same.
        self._hint = todo = hint(str(error), tls=self._policy.tls) or self._hint
        return UnavailableError(f"{self._policy.address}: {trouble}: " + (f"{todo} ({error})" if todo else str(error)))
