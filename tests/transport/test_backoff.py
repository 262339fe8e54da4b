"""Pauses between attempts."""

from __future__ import annotations

from streamflow.transport.backoff import Backoff


class Clock:
    """Seconds, moved on by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_pauses_grow_to_a_limit() -> None:
    clock = Clock()
    backoff = Backoff(base_s=0.1, cap_s=5, clock=clock)
    assert backoff.next_s() == 0
    for most_s in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, *[5.0] * 2000):
        backoff.failed()
        pause_s = backoff.next_s()
        assert most_s / 2 <= pause_s <= most_s
        clock.now_s += pause_s
    backoff.succeeded()
    assert backoff.next_s() == 0


def test_what_fails_in_a_burst_counts_once() -> None:
    clock = Clock()
    backoff = Backoff(base_s=0.1, cap_s=5, clock=clock)
    for _ in range(8):
        backoff.failed()
        clock.now_s += 0.001
    assert backoff.next_s() <= 0.1
    backoff.succeeded()
    backoff.failed()
    assert 0 < backoff.next_s() <= 0.1
