"""The fault matrix: at the end, a table of what every fault cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.faults.harness import Tally

QUICK = os.environ.get("STREAMFLOW_QUICK", "") not in ("", "0")
"""For every change: fewer requests, and only the rows without the mark `full`."""

SOAK_S = float(os.environ.get("STREAMFLOW_SOAK_S", "20" if QUICK else "60"))

_tallies: list[Tally] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if QUICK:
        skip = pytest.mark.skip(reason="only in the full matrix")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Where a test writes down what it did; its fault is the test's name."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    one = Tally(name)
    began = time.monotonic()
    yield one
    one.seconds = time.monotonic() - began
    _tallies.append(one)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _tallies:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(
        f"{'fault':<60} {'requests':>8} {'lost':>5} {'wrong':>6} {'recovery s':>11} {'took s':>7}"
    )
    for one in _tallies:
        recovery = "" if one.recovery_s is None else f"{one.recovery_s:.2f}"
        counts = f"{one.requests:>8} {len(one.lost):>5} {len(one.wrong):>6} {recovery:>11} {one.seconds:>7.1f}"
        terminalreporter.write_line(f"{one.fault:<60} {counts}")
