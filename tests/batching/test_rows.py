from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamflow.batching.rows import plan_rows, split_calls


@given(st.lists(st.booleans(), min_size=1, max_size=64))
def test_each_slot_has_one_row_and_each_guided_slot_another(guided: list[bool]) -> None:
    plan = plan_rows(guided)
    assert plan.positions[: len(guided)] == tuple(range(len(guided)))
    assert plan.positions[len(guided) :] == plan.guided == tuple(i for i, g in enumerate(guided) if g)


@given(st.integers(1, 200), st.sets(st.integers(1, 64), min_size=1))
def test_calls_cover_every_row_once_and_use_compiled_counts(rows: int, counts: set[int]) -> None:
    compiled = tuple(sorted(counts))
    calls = list(split_calls(rows, compiled))
    assert [row for call in calls for row in range(call.start, call.stop)] == list(range(rows))
    for call in calls:
        assert call.padded in counts
        # No smaller compiled count would do.
        assert not [count for count in compiled if call.stop - call.start <= count < call.padded]


def test_any_row_count_is_one_unpadded_call() -> None:
    (call,) = split_calls(37, None)
    assert (call.start, call.stop, call.padded) == (0, 37, 37)
