"""What a network call costs by its rows, C(rows) = c0 + c1 rows, and what follows from it.

c0 is paid for every call however few its rows are (launches, weights read once), c1 for every row. Their quotient says
how far batching helps: at rows = c0 / c1 a row costs twice what it costs in an endless batch.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from streamflow.backends.store import locked

if TYPE_CHECKING:
    from streamflow.backends.parts import Part, Runner

K = TypeVar("K")

COSTS = "costs.json"
"""Beside a checkpoint's graphs and engines: what was measured with them."""

_WASTE = 0.15
"""Of a call's time that padding may take before there is a bucket for fewer rows."""
_NEAR = 0.1
"""How near to an endless batch a row's cost shall be with the default number of slots."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a call: `c0_s` + `c1_s` for every row."""

    c0_s: float
    c1_s: float

    def __call__(self, rows: int) -> float:
        return self.c0_s + self.c1_s * rows

    def buckets(self, largest: int) -> tuple[int, ...]:
        """Row counts to compile for, rising up to `largest`: as few as keep padding below 15 % of a call's time."""
        found = [largest]
        while found[-1] > 1:
            # The most rows whose own call would be cheaper by more than that; fewer are padded to the bucket above.
            limit = (1 - _WASTE) * self(found[-1])
            below = min(found[-1] - 1, int((limit - self.c0_s) / self.c1_s)) if self.c1_s > 0 else 0
            if below < 1:
                break
            found.append(below)
        return tuple(reversed(found))

    def slots(self, *, least: int, most: int) -> int:
        """A power of two with which a row costs at most 10 % more than in an endless batch."""
        slots = least
        while slots < most and self.c0_s > _NEAR * self.c1_s * slots:
            slots *= 2
        return slots


def fit(seconds: Mapping[int, float]) -> Cost:
    """The line through measured calls, by rows; neither part is negative.

    Raises:
        ValueError: fewer than two numbers of rows.
    """
    if len(seconds) < 2:
        raise ValueError(f"seconds: got {len(seconds)} numbers of rows; allowed: 2 or more")
    rows, times = np.array(list(seconds)), np.array(list(seconds.values()))
    # Weighted, so that each is fitted as well in proportion: else the largest call alone would decide.
    c1_s, c0_s = np.polyfit(rows, times, 1, w=1 / times)
    if c0_s < 0:
        return Cost(0.0, float(np.average(times / rows)))
    return Cost(float(c0_s), 0.0) if c1_s < 0 else Cost(float(c0_s), float(c1_s))


def measure(
    call: Callable[[K], None], kinds: Sequence[K], *, repeats: int = 5, budget_s: float = math.inf
) -> dict[K, float]:
    """Seconds of `call(kind)`: medians of interleaved repeats, after one call each that is not counted.

    Args:
        call: makes a call of a kind, such as a number of rows, and waits for its end.
        kinds: two or more, the cheapest first.
        budget_s: when it is spent no more is measured than two kinds, once.
    """
    ends_s = time.perf_counter() + budget_s
    taken: dict[K, list[float]] = {}
    for kind in kinds:
        if len(taken) >= 2 and time.perf_counter() > ends_s:
            break
        call(kind)
        taken[kind] = []
    for repeat in range(repeats):
        if repeat and time.perf_counter() > ends_s:
            break
        for kind, times in taken.items():
            began_s = time.perf_counter()
            call(kind)
            times.append(time.perf_counter() - began_s)
    return {kind: median(times) for kind, times in taken.items()}


def cost_of(part: Part, runner: Runner, counts: Sequence[int], *, budget_s: float = 30.0) -> Cost:
    """Of a part's calls at its own size."""

    def call(rows: int) -> None:
        # To the CPU: only then it has ended.
        runner(examples[rows])[:1].cpu()

    examples = {rows: part.example(rows) for rows in counts}
    return fit(measure(call, counts, budget_s=budget_s))


def remembered(
    path: Path | None,
    key: str,
    measured: Callable[[], Sequence[float]],
    *,
    count: int,
    stale: Callable[[Sequence[float]], bool] = lambda figures: False,
) -> list[float]:
    """What was measured before on this machine, or is now and written down for the next time.

    Of several processes one measures at a time: they would measure each other.

    Args:
        path: a JSON file; None = measured every time.
        key: all that the figures depend on.
        count: of figures.
        stale: whether what was remembered is to be measured again.
    """
    if path is None:
        return list(measured())
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.with_suffix(".lock")))
        known = _read(path)
        if len(known.get(key, ())) != count or stale(known[key]):
            known[key] = list(measured())
            _write(path, known)
    return known[key]


def _read(path: Path) -> dict[str, list[float]]:
    try:
        said = json.loads(path.read_text("utf-8"))
        return {key: [float(value) for value in values] for key, values in said.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # Not there, or not ours: it is measured anew.
        return {}


def _write(path: Path, known: Mapping[str, Sequence[float]]) -> None:
    """Atomic; a folder that cannot be written to costs no more than the time to measure again."""
    made = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        made.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        os.replace(made, path)
