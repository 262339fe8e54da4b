"""Rows: which network rows a group of slots needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from streamflow.flow.programs import Op, Role


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The rows of one network call: one for each slot, then a negative one for each guided slot, then padding.

    Attributes:
        positions: per row, the slot's position in the group.
        roles: per row, what it is conditioned on.
        negatives: per slot, the row of its negative output; its own row where it is not guided.
        count: rows before the padding.
    """

    positions: tuple[int, ...]
    roles: tuple[Role, ...]
    negatives: tuple[int, ...]
    count: int


def plan_rows(ops: Sequence[Op], row_counts: tuple[int, ...] | None) -> RowPlan:
    """Args: row_counts: what the network was compiled for; the plan is padded to the next one. None = any."""
    guided = [position for position, op in enumerate(ops) if op.guided]
    negative_rows = dict(zip(guided, range(len(ops), len(ops) + len(guided)), strict=True))
    positions = [*range(len(ops)), *guided]
    roles = [*(op.role for op in ops), *(Role.NEGATIVE for _ in guided)]
    count = len(positions)
    padding = _padded(count, row_counts) - count
    # Padding repeats a real row: zeros could give nan, which some kernels make slow.
    return RowPlan(
        positions=(*positions, *positions[:1] * padding),
        roles=(*roles, *roles[:1] * padding),
        negatives=tuple(negative_rows.get(position, position) for position in range(len(ops))),
        count=count,
    )


def cut(costs: Sequence[int], row_counts: tuple[int, ...] | None) -> Iterator[slice]:
    """Cuts a group of slots into parts of which each fits into one network call.

    Args:
        costs: rows per slot, 1 or 2; they stay together.
        row_counts: see `plan_rows`.
    """
    if row_counts is None:
        yield slice(0, len(costs))
        return
    start, before = 0, 0
    for position, total in enumerate(accumulate(costs)):
        if total - before > row_counts[-1]:
            yield slice(start, position)
            start, before = position, total - costs[position]
    yield slice(start, len(costs))


def _padded(count: int, row_counts: tuple[int, ...] | None) -> int:
    return count if row_counts is None else next(compiled for compiled in row_counts if compiled >= count)
