"""A call's rows shared out between the cores of a CPU.

The operators of a small network are too short to be split between cores: each would be waited for before the next one
begins. Rows do not depend on each other, so every core runs the whole network on a part of them. On 2 cores a call of
16 rows takes three quarters of the time (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Feed = Mapping[str, np.ndarray]
"""Inputs by name, each [rows, ...]."""

Call = Callable[[Feed], np.ndarray]


class Lanes:
    """One network on several cores.

    Args:
        wide: a call on all cores, for rows that are fewer than these.
        narrow: calls on one core each that may run beside each other; one for each core.
    """

    def __init__(self, wide: Call, narrow: Sequence[Call]) -> None:
        self._wide, self._narrow = wide, narrow
        # The calling thread takes a part too.
        self._pool = ThreadPoolExecutor(max(1, len(narrow) - 1), "lane")

    def __call__(self, feed: Feed) -> np.ndarray:
        """Returns: [rows, ...], the caller's own."""
        rows, lanes = len(next(iter(feed.values()))), len(self._narrow)
        each, rest = divmod(rows, lanes)
        if lanes == 1 or not each:
            return self._wide(feed)
        parts = [_rows(feed, lane * each, each) for lane in range(lanes)]
        others = [self._pool.submit(call, part) for call, part in zip(self._narrow[1:], parts[1:], strict=True)]
        made = [self._narrow[0](parts[0]), *(other.result() for other in others)]
        if rest:
            made.append(self._wide(_rows(feed, lanes * each, rest)))
        return np.concatenate(made)


def _rows(feed: Feed, first: int, count: int) -> dict[str, np.ndarray]:
    return {name: values[first : first + count] for name, values in feed.items()}
