from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamflow.batching.rows import cut, plan_rows
from streamflow.flow.programs import Op, Role

COUNTS = st.sets(st.integers(1, 64), min_size=1).map(lambda counts: tuple(sorted({*counts, 64})))


def op(*, guided: bool, role: Role = Role.TARGET) -> Op:
    return Op(name="E", step=0, sigma=0.0, timestep=1000.0, guidance_scale=2.0 if guided else 1.0, role=role)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(Role)), min_size=1, max_size=32), COUNTS)
def test_each_slot_has_one_row_and_each_guided_slot_another(slots: list[tuple[bool, Role]], counts: tuple[int]) -> None:
    for row_counts in (None, counts):
        plan = plan_rows([op(guided=guided, role=role) for guided, role in slots], row_counts)
        assert plan.count == len(slots) + sum(guided for guided, _ in slots)
        assert plan.positions[: len(slots)] == tuple(range(len(slots)))
        assert plan.roles[: len(slots)] == tuple(role for _, role in slots)
        for position, ((guided, _), negative) in enumerate(zip(slots, plan.negatives, strict=True)):
            assert plan.positions[negative] == position
            assert plan.roles[negative] is Role.NEGATIVE if guided else negative == position
        assert sorted({*range(len(slots)), *plan.negatives}) == list(range(plan.count))


@given(st.lists(st.booleans(), min_size=1, max_size=32), COUNTS)
def test_padding_goes_to_the_next_compiled_count(guided: list[bool], counts: tuple[int, ...]) -> None:
    plan = plan_rows([op(guided=one) for one in guided], counts)
    assert len(plan.positions) == len(plan.roles) == min(count for count in counts if count >= plan.count)


@given(st.lists(st.integers(1, 2), min_size=1, max_size=200), st.integers(2, 64))
def test_parts_cover_every_slot_once_and_fit_into_a_call(costs: list[int], largest: int) -> None:
    parts = list(cut(costs, (1, largest)))
    assert [position for part in parts for position in range(len(costs))[part]] == list(range(len(costs)))
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        assert 0 < sum(costs[part]) <= largest
        # No part is cut short.
        assert after is None or sum(costs[part]) + costs[after.start] > largest
    assert list(cut(costs, None)) == [slice(0, len(costs))]
