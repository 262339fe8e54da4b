"""The fit of what calls cost, and the choices that follow from it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from streamflow.backends.cost import Cost, fit, measure, remembered


def test_a_line_is_found_again() -> None:
    true = Cost(0.004, 0.0025)
    found = fit({rows: true(rows) for rows in (1, 2, 4, 8, 16)})
    assert (found.c0_s, found.c1_s) == pytest.approx((true.c0_s, true.c1_s))


def test_neither_part_is_negative() -> None:
    assert fit({1: 0.001, 2: 0.0021, 4: 0.0044}).c0_s == 0
    assert fit({1: 0.010, 2: 0.0099, 4: 0.0098}).c1_s == 0
    with pytest.raises(ValueError, match="2 or more"):
        fit({1: 0.1})


@pytest.mark.parametrize("cost", [Cost(0.004, 0.0025), Cost(0.0, 0.001), Cost(0.1, 0.0001), Cost(1.0, 0.0)])
@pytest.mark.parametrize("largest", [1, 2, 16, 100])
def test_buckets_waste_little_and_are_few(cost: Cost, largest: int) -> None:
    buckets = cost.buckets(largest)
    assert buckets[-1] == largest
    assert list(buckets) == sorted(set(buckets))
    for rows in range(1, largest + 1):
        bucket = next(one for one in buckets if one >= rows)
        # One row cannot be shared out: the smallest buckets are next to each other.
        assert cost(rows) >= 0.85 * cost(bucket) - cost.c1_s
    for fewer, more in pairwise(buckets):
        assert cost(fewer) <= 0.85 * cost(more), "they are farther apart than what may be wasted"


def test_slots_are_enough_to_share_what_every_call_costs() -> None:
    assert Cost(0.0, 0.001).slots(least=4, most=64) == 4
    assert Cost(0.0016, 0.001).slots(least=4, most=64) == 16
    assert Cost(1.0, 0.001).slots(least=4, most=64) == 64


def test_measuring_calls_every_number_of_rows_as_often() -> None:
    calls: list[int] = []
    assert set(measure(calls.append, [1, 4], repeats=3)) == {1, 4}
    assert calls == [1, 4] * 4


def test_measuring_ends_with_its_budget() -> None:
    calls: list[int] = []
    assert set(measure(calls.append, [1, 2, 4, 8], repeats=3, budget_s=0.0)) == {1, 2}
    assert calls == [1, 2] * 2


def test_what_was_measured_is_remembered(tmp_path: Path) -> None:
    path, asked = tmp_path / "engines" / "costs.json", []

    def measured() -> list[float]:
        asked.append(1)
        return [0.1, float(len(asked))]

    assert [remembered(path, key, measured, count=2)[1] for key in ("a", "b", "a", "b")] == [1, 2, 1, 2]
    assert remembered(None, "a", measured, count=2)[1] == 3
    for text in ('["what is this"]', '{"a": [1.0]}', '{"a": ["x", 1.0]}', "{"):
        path.write_text(text)
        found = remembered(path, "a", measured, count=2)
        assert found == remembered(path, "a", measured, count=2) == [0.1, float(len(asked))]


def test_a_folder_that_cannot_be_written_to_costs_only_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert remembered(blocked / "costs.json", "a", lambda: [1.0, 2.0], count=2) == [1.0, 2.0]


def test_what_is_stale_is_measured_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "costs.json", iter(range(9))

    def measured() -> list[float]:
        return [float(next(asked)), 0.0]

    for stale, expected in ((True, 0.0), (False, 0.0), (True, 1.0), (False, 1.0)):
        assert remembered(path, "a", measured, count=2, stale=lambda figures, it=stale: it)[0] == expected
