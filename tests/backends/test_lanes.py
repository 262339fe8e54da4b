"""Rows shared out between cores, and how many cores there are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from streamflow.backends import runtime
from streamflow.backends.lanes import Feed, Lanes

CORES = 3


class Recorded:
    """A call that remembers the rows that it got, and gives something that belongs to them."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def __call__(self, feed: Feed) -> np.ndarray:
        self.rows.append(feed["a"][:, 0].tolist())
        return feed["a"] + feed["b"][:, None]


@pytest.mark.parametrize(
    ("rows", "wide", "narrow"),
    [
        (1, [[0]], [[], [], []]),
        (2, [[0, 1]], [[], [], []]),
        (3, [], [[[0]], [[1]], [[2]]]),
        (7, [[6]], [[[0, 1]], [[2, 3]], [[4, 5]]]),
    ],
)
def test_every_core_gets_as_many_rows(rows: int, wide: list[object], narrow: list[object]) -> None:
    on_all, on_one = Recorded(), [Recorded() for _ in range(CORES)]
    feed = {"a": np.arange(rows, dtype=np.float32)[:, None].repeat(2, 1), "b": np.arange(rows, dtype=np.float32)}
    assert np.array_equal(Lanes(on_all, on_one)(feed), feed["a"] * 2)
    assert on_all.rows == wide
    assert [one.rows for one in on_one] == narrow


def test_an_error_of_a_core_is_the_calls() -> None:
    def broken(feed: Feed) -> np.ndarray:
        raise RuntimeError("no memory")

    feed = {"a": np.zeros((4, 1), np.float32), "b": np.zeros(4, np.float32)}
    with pytest.raises(RuntimeError, match="no memory"):
        Lanes(Recorded(), [Recorded(), broken])(feed)


def test_a_core_goes_on_after_an_error() -> None:
    fails = [True]

    def sometimes(feed: Feed) -> np.ndarray:
        if fails.pop():
            raise RuntimeError("no memory")
        return feed["a"]

    lanes, feed = Lanes(Recorded(), [lambda feed: feed["a"], sometimes]), {"a": np.ones((4, 1), np.float32)}
    with pytest.raises(RuntimeError, match="no memory"):
        lanes(feed)
    fails.append(False)
    assert np.array_equal(lanes(feed), feed["a"])


def test_threads_go_with_their_network() -> None:
    before = set(threading.enumerate())
    lanes = Lanes(Recorded(), [Recorded() for _ in range(CORES)])
    theirs = set(threading.enumerate()) - before
    assert len(theirs) == CORES - 1
    del lanes
    for thread in theirs:
        thread.join(10)
        assert not thread.is_alive()


def test_a_call_that_hangs_does_not_keep_a_process_from_ending() -> None:
    program = """
import threading
import numpy as np
from streamflow.backends.lanes import Lanes
hangs, never = threading.Event(), threading.Event()
lanes = Lanes(None, [lambda feed: feed["a"], lambda feed: hangs.set() or never.wait()])
threading.Thread(target=lanes, args=({"a": np.zeros((2, 1))},), daemon=True).start()
assert hangs.wait(20)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0


@pytest.mark.parametrize(
    ("written", "cores"),
    [
        ("250000 100000", 2),
        ("150000 100000", 1),
        ("max 100000", sys.maxsize),
        ("50000 100000", 1),
        ("what", sys.maxsize),
    ],
)
def test_a_containers_share_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, cores: int
) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text(written + "\n")
    monkeypatch.setattr(runtime, "_CPU_MAX", limit)
    assert runtime.available_cores() == min(len(os.sched_getaffinity(0)), cores)
