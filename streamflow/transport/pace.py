"""How fast a worker is: what an image takes of its time."""

from __future__ import annotations

import time
from collections.abc import Callable

_MEMORY = 0.98


class Pace:
    """The time during which a worker had work in hand, over the images that it ended in it.

    Images share that time where they are worked on at once, so this is what one more of them costs. Each counts less
    with every one that follows: the last fifty or so decide.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s: float | None = None
        self._open_s = self._busy_s = self._images = 0.0

    @property
    def image_s(self) -> float:
        """0 before the first image."""
        return self._busy_s / self._images if self._images else 0.0

    def took(self) -> None:
        """Something is in hand."""
        if self._since_s is None:
            self._since_s = self._clock()

    def emptied(self) -> None:
        """Nothing is in hand any more."""
        self._pass_time()
        self._since_s = None

    def ended(self) -> None:
        """An image was ended here, or went on."""
        self._pass_time()
        self._busy_s, self._images = _MEMORY * self._busy_s + self._open_s, _MEMORY * self._images + 1
        self._open_s = 0.0

    def _pass_time(self) -> None:
        if self._since_s is not None:
            now_s = self._clock()
            self._open_s, self._since_s = self._open_s + now_s - self._since_s, now_s
