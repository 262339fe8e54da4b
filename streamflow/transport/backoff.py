"""How long to wait before what failed is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from math import inf


class Backoff:
    """Longer and longer pauses while something fails; none after a success.

    What fails in a burst counts once: before half of a pause is over, nothing new has been tried.
    """

    def __init__(self, *, base_s: float = 0.1, cap_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._base_s, self._cap_s, self._clock = base_s, cap_s, clock
        self._failures = 0
        self._counted_until_s = -inf

    def failed(self) -> None:
        now_s = self._clock()
        if now_s >= self._counted_until_s:
            self._failures += 1
            self._counted_until_s = now_s + 0.5 * self._longest_s

    def succeeded(self) -> None:
        self._failures, self._counted_until_s = 0, -inf

    def next_s(self) -> float:
        # Jitter, so that workers which failed together do not return together.
        return self._longest_s * random.uniform(0.5, 1.0)  # nosec B311

    @property
    def _longest_s(self) -> float:
        return min(self._cap_s, self._base_s * 2.0 ** min(self._failures - 1, 16)) if self._failures else 0.0
