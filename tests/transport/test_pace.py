"""What an image costs of a worker's time."""

from __future__ import annotations

from streamflow.transport.pace import Pace


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_images_share_the_time_in_which_any_was_worked_on() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.image_s == 0
    pace.began("a")
    pace.began("b")
    clock.now_s += 3
    pace.left("a")
    pace.ended()
    clock.now_s += 1
    pace.left("b")
    pace.ended()
    # Idle time is nobody's.
    clock.now_s += 1000
    pace.began("c")
    clock.now_s += 2
    pace.left("c")
    pace.ended()
    assert 1.9 < pace.image_s < 2.1


def test_it_follows_a_change_within_some_hundred_images() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.began("all of them")
    for seconds in [1.0] * 300 + [4.0] * 300:
        clock.now_s += seconds
        pace.ended()
    assert 3.9 < pace.image_s <= 4.0


def test_attempts_that_came_to_nothing_cost_as_well() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.began("a")
    clock.now_s += 5
    pace.left("a")
    pace.began("a again")
    clock.now_s += 1
    pace.left("a again")
    pace.ended()
    assert pace.image_s == 6


def test_outcomes_that_wait_for_the_store_cost_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.began("a")
    pace.began("b")
    clock.now_s += 4
    pace.left("a")
    clock.now_s += 2
    pace.left("b")
    # The store is away.
    clock.now_s += 600
    pace.ended()
    pace.left("a")
    pace.ended()
    assert 2.9 < pace.image_s < 3.1
