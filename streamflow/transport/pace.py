"""How fast a worker is: what an image takes of its time."""

from __future__ import annotations

import time
from collections.abc import Callable

_MEMORY = 0.98


class Pace:
    """The time during which a worker was at work, over the images that it ended in it.

    Images share that time where they are worked on at once, so this is what one more of them costs. Each counts less
    with every one that follows: the last fifty or so decide. Outcomes that wait for the store are no work any more.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at_work: set[object] = set()
        self._since_s = 0.0
        self._open_s = self._busy_s = self._images = 0.0

    @property
    def image_s(self) -> float:
        """0 before the first image."""
        return self._busy_s / self._images if self._images else 0.0

    def began(self, work: object) -> None:
        """Something is being worked on."""
        self._pass_time()
        self._at_work.add(work)

    def left(self, work: object) -> None:
        """It is not worked on any more; it may have been said before."""
        self._pass_time()
        self._at_work.discard(work)

    def ended(self) -> None:
        """An image was ended here, or went on."""
        self._pass_time()
        self._busy_s, self._images = _MEMORY * self._busy_s + self._open_s, _MEMORY * self._images + 1
        self._open_s = 0.0

    def _pass_time(self) -> None:
        now_s = self._clock()
        if self._at_work:
            self._open_s += now_s - self._since_s
        self._since_s = now_s
