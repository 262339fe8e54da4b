"""What an image costs of a worker's time."""

from __future__ import annotations

from streamflow.transport.pace import Pace


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_images_share_the_time_in_which_any_was_in_hand() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.image_s == 0
    pace.took()
    pace.took()
    clock.now_s += 3
    pace.ended()
    clock.now_s += 1
    pace.ended()
    pace.emptied()
    # Idle time is nobody's.
    clock.now_s += 1000
    pace.took()
    clock.now_s += 2
    pace.ended()
    pace.emptied()
    assert 1.9 < pace.image_s < 2.1


def test_it_follows_a_change_within_some_hundred_images() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.took()
    for seconds in [1.0] * 300 + [4.0] * 300:
        clock.now_s += seconds
        pace.ended()
    assert 3.9 < pace.image_s <= 4.0


def test_attempts_that_came_to_nothing_cost_as_well() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.took()
    clock.now_s += 5
    pace.emptied()
    pace.took()
    clock.now_s += 1
    pace.ended()
    assert pace.image_s == 6
