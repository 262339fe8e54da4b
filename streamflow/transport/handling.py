"""One entry in the hands of a stage's handler: what the handler sees of it, and what it may answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened while an entry was worked on; `at_s` since 1970."""

    at_s: float
    name: str
    attributes: Mapping[str, int | float | str]


@dataclass(frozen=True, slots=True)
class WorkRecord:
    """What a worker did with an entry, told when it is over.

    Attributes:
        outcome: advanced, finished, failed, handed_back, deadline, cancelled, late (it was no longer ours when the work
            was done) or dropped (found out while it was being done).
        began_s: since 1970.
        waited_s: how long the entry lay in its stream.
        worked_s: from taking it until its outcome was stored.
        image_s: how long the image took since its admission; None unless this ended it.
    """

    entry: Entry
    outcome: str
    began_s: float
    waited_s: float
    worked_s: float
    notes: Sequence[Note] = ()
    image_s: float | None = None


class EntryContext:
    """One entry in hand, as its handler sees it. Belongs to the event loop: other threads call it through the loop.

    Attributes:
        at_work: the outcome is not known yet.
        elsewhere: the image was found at another place since; its outcome's own move may have brought it there.
        step_s: the longest time from one progress to the next one so far.
        image_s: how long the image took, from its admission on; set by the handler that ends it.
    """

    def __init__(self, entry: Entry, *, progress_timeout_s: float) -> None:
        self.entry = entry
        self.at_work, self.elsewhere = True, False
        self.step_s = 0.0
        self.image_s: float | None = None
        self._notes: list[Note] = []
        self._began_s, self._taken = time.time(), time.perf_counter()
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

    def note(self, name: str, **attributes: int | float | str) -> None:
        """Remembers something for the entry's trace; few of them, each costs a little memory."""
        self._notes.append(Note(time.time(), name, attributes))

    def record(self, outcome: str) -> WorkRecord:
        """Called once the outcome is stored."""
        entry = self.entry
        waited_s = max(0.0, entry.deadline_at_s - entry.remaining_s - entry.enqueued_at_s)
        worked_s = time.perf_counter() - self._taken
        image_s = self.image_s if outcome == "finished" else None
        return WorkRecord(entry, outcome, self._began_s, waited_s, worked_s, tuple(self._notes), image_s)

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
            self.at_work = False

    def _next_limit(self) -> float:
        return min(self._deadline, asyncio.get_running_loop().time() + self._progress_timeout_s)


class OutOfTimeError(Exception):
    """There was no progress for too long, or the deadline passed."""


Handler = Callable[[EntryContext], Awaitable[Outcome]]
