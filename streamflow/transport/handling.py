"""One entry in the hands of a stage's handler: what the handler sees of it, and what it may answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from streamflow.transport.base import Entry, Payload
from streamflow.types import Failure, Stage


@dataclass(frozen=True, slots=True)
class Advance:
    """The image goes on to another stage, with what that stage needs to know."""

    to: Stage
    payload: Payload
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The image is done, or failed for good."""

    result: bytes | Failure


Outcome = Advance | Finish


class EntryContext:
    """One entry in hand, as its handler sees it. Belongs to the event loop: other threads call it through the loop.

    Attributes:
        step_s: the longest time from one progress to the next one so far.
    """

    def __init__(self, entry: Entry, *, progress_timeout_s: float) -> None:
        self.entry = entry
        self.step_s = 0.0
        self._last_progress: float | None = None
        self._progress_timeout_s = progress_timeout_s
        self._deadline = asyncio.get_running_loop().time() + entry.remaining_s
        self._limit: asyncio.Timeout | None = None

    def progress(self) -> None:
        """Says that the work goes on; without it the handler is stopped after the worker's `progress_timeout_s`."""
        now = asyncio.get_running_loop().time()
        if self._last_progress is not None:
            self.step_s = max(self.step_s, now - self._last_progress)
        self._last_progress = now
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(self._next_limit())

    @property
    def past_deadline(self) -> bool:
        return asyncio.get_running_loop().time() >= self._deadline

    async def run(self, handle: Handler) -> Outcome:
        """Raises OutOfTimeError when there was no progress for too long, or when the deadline passed."""
        try:
            async with asyncio.timeout_at(self._next_limit()) as limit:
                self._limit = limit
                return await handle(self)
        except Exception as error:
            if limit.expired():
                raise OutOfTimeError from error
            raise
        finally:
            self._limit = None

    def _next_limit(self) -> float:
        return min(self._deadline, asyncio.get_running_loop().time() + self._progress_timeout_s)


class OutOfTimeError(Exception):
    """There was no progress for too long, or the deadline passed."""


Handler = Callable[[EntryContext], Awaitable[Outcome]]
