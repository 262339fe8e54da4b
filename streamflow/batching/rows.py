"""Rows: which network rows a set of slots needs, and how they are cut into calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The rows of one group of slots: a conditional row each, then an unconditional one for each guided slot.

    Attributes:
        positions: per row, the slot's position in the group.
        guided: positions of the guided slots; their unconditional rows follow the conditional ones, in this order.
    """

    positions: tuple[int, ...]
    guided: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One network call: rows `start` to `stop` of the plan, padded to `padded` rows."""

    start: int
    stop: int
    padded: int


def plan_rows(guided: Sequence[bool]) -> RowPlan:
    """Args: guided: per slot of the group, whether its op is guided."""
    extra = tuple(position for position, is_guided in enumerate(guided) if is_guided)
    return RowPlan((*range(len(guided)), *extra), extra)


def split_calls(rows: int, row_counts: tuple[int, ...] | None) -> Iterator[Call]:
    """Cuts `rows` into calls no larger than the largest compiled count, each padded to the next compiled count."""
    if row_counts is None:
        yield Call(0, rows, rows)
        return
    largest = row_counts[-1]
    for start in range(0, rows, largest):
        stop = min(start + largest, rows)
        yield Call(start, stop, next(count for count in row_counts if count >= stop - start))
