"""How long images take, learned from those that were made: the mathematics behind the memory transport's estimates.

`scripts/common.lua` does the same for the Redis one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import frexp, inf


@dataclass(slots=True)
class Sums:
    """Of images that were under way among about as many others; each counts less with every one that follows.

    Attributes:
        n, w, t, ww, wt, x: 1, work, time, products, and how many were under way.
        at_s: when the last one ended.
    """

    n: float = 0.0
    w: float = 0.0
    t: float = 0.0
    ww: float = 0.0
    wt: float = 0.0
    x: float = 0.0
    at_s: float = -inf

    def add(self, work: float, time_s: float, load: float, *, memory: float) -> None:
        terms = {"n": 1.0, "w": work, "t": time_s, "ww": work * work, "wt": work * time_s, "x": load}
        for name, term in terms.items():
            setattr(self, name, memory * getattr(self, name) + term)

    def image_s(self, work: float) -> float:
        """On a line through the measured images; through the origin where they were all alike."""
        mean_w, mean_t = self.w / self.n, self.t / self.n
        variance, covariance = self.ww / self.n - mean_w**2, self.wt / self.n - mean_w * mean_t
        alike = variance <= 0.01 * mean_w**2 or covariance <= 0
        return max(0.0, mean_t + (mean_t / mean_w if alike else covariance / variance) * (work - mean_w))


@dataclass(slots=True)
class Measured:
    """What estimates are made of; see common.lua.

    Attributes:
        classes: by the binary logarithm of how many images were under way.
        busy, done: slot-seconds, and the work that they took, while every slot was in use.
        last_done_s: end of the last image, or of the last time that nothing was under way.
        full_since_s: when the last free slot was taken.
        steady_since_s: what began before says nothing: a stage had no replica.
    """

    memory: float
    classes: dict[int, Sums] = field(default_factory=dict)
    busy: float = 0.0
    done: float = 0.0
    last_done_s: float = 0.0
    full_since_s: float = 0.0
    steady_since_s: float = 0.0

    def add_busy(self, work: float, slot_seconds: float) -> None:
        self.busy, self.done = self.memory * self.busy + slot_seconds, self.memory * self.done + work

    def slot_seconds(self, work: float) -> float:
        return work * self.busy / self.done if self.done else 0.0

    def image_s(self, work: float, load: float) -> tuple[float | None, float]:
        """How long an image is under way among `load`, or the least that it can be; and when that was measured."""
        own = class_of(load)
        if own in self.classes:
            return self.classes[own].image_s(work), self.classes[own].at_s
        least = [
            sums.image_s(work) * (1.0 if number < own else load * sums.n / sums.x)
            for number, sums in self.classes.items()
        ]
        return max(least, default=None), max((sums.at_s for sums in self.classes.values()), default=-inf)


def class_of(load: float) -> int:
    """The class of images that are under way among so many: 1, 2 or 3, 4 to 7 ... of them."""
    return frexp(max(1.0, load))[1] - 1
