"""A call's rows shared out between the cores of a CPU.

The operators of a small network are too short to be split between cores: each would be waited for before the next one
begins. Rows do not depend on each other, so every core runs the whole network on a part of them. On 2 cores a call of
16 rows takes three quarters of the time (docs/engines.md).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import numpy as np

Feed = Mapping[str, np.ndarray]
"""Inputs by name, each [rows, ...]."""

Call = Callable[[Feed], np.ndarray]


class Lanes:
    """One network on several cores; it takes one call at a time.

    Args:
        wide: a call on all cores, for rows that are fewer than these.
        narrow: calls on one core each that may run beside each other; one for each core.
    """

    def __init__(self, wide: Call, narrow: Sequence[Call]) -> None:
        # The calling thread is a lane too.
        self._wide, self._first = wide, narrow[0]
        self._others = [_Lane(call) for call in narrow[1:]]

    def __call__(self, feed: Feed) -> np.ndarray:
        """Returns: [rows, ...], the caller's own."""
        rows, lanes = len(next(iter(feed.values()))), 1 + len(self._others)
        each, rest = divmod(rows, lanes)
        if lanes == 1 or not each:
            return self._wide(feed)
        parts = [_rows(feed, lane * each, each) for lane in range(lanes)]
        others = [lane.submit(part) for lane, part in zip(self._others, parts[1:], strict=True)]
        made = [self._first(parts[0]), *(other.result() for other in others)]
        if rest:
            made.append(self._wide(_rows(feed, lanes * each, rest)))
        return np.concatenate(made)


class _Lane:
    """A thread of its own, which goes when this does.

    A daemon: a call that hangs must not keep the process from ending, as a pool's threads would.
    """

    def __init__(self, call: Call) -> None:
        self._waiting: SimpleQueue[tuple[Feed, Future[np.ndarray]] | None] = SimpleQueue()
        threading.Thread(target=_work, args=(call, self._waiting), name="lane", daemon=True).start()
        weakref.finalize(self, self._waiting.put, None)

    def submit(self, feed: Feed) -> Future[np.ndarray]:
        made: Future[np.ndarray] = Future()
        self._waiting.put((feed, made))
        return made


def _work(call: Call, waiting: SimpleQueue[tuple[Feed, Future[np.ndarray]] | None]) -> None:
    while (asked := waiting.get()) is not None:
        feed, made = asked
        try:
            made.set_result(call(feed))
        except BaseException as error:
            made.set_exception(error)
        # Else the last call's arrays would stay until the next one.
        del asked, feed, made


def _rows(feed: Feed, first: int, count: int) -> dict[str, np.ndarray]:
    return {name: values[first : first + count] for name, values in feed.items()}
