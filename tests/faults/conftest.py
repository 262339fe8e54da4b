"""The fault matrix: at the end, a table of what every fault cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Tally

QUICK = os.environ.get("STREAMFLOW_QUICK", "") not in ("", "0")
"""For every change: fewer requests, and only the rows without the mark `full`."""

SOAK_S = float(os.environ.get("STREAMFLOW_SOAK_S", "15"))

_tallies: list[Tally] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if QUICK:
        full = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in full]
        config.hook.pytest_deselected(items=full)


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
    terminalreporter.write_line(_line("fault", "requests", "lost", "wrong", "recovery s", "took s"))
    for one in _tallies:
        terminalreporter.write_line(_line(*_cells(one)))
    for one in _tallies:
        if one.note:
            terminalreporter.write_line(f"{one.fault}: {one.note}")
    path = os.environ.get("STREAMFLOW_FAULTS_TABLE", "")
    if path and not terminalreporter.stats.get("failed"):
        Path(path).write_text(_table(), "utf-8")
        terminalreporter.write_line(f"written to {path}")


def _cells(one: Tally) -> tuple[str, ...]:
    recovery = "" if one.recovery_s is None else f"{one.recovery_s:.2f}"
    counts = f"{one.requests}", f"{len(one.lost)}", f"{len(one.wrong)}"
    return one.fault, *counts, recovery, f"{one.seconds:.1f}"


def _line(fault: str, *numbers: str) -> str:
    return f"{fault:<72}" + "".join(f"{number:>11}" for number in numbers)


def _table() -> str:
    """Markdown, with the date."""
    head = "| fault | requests | lost | wrong | recovery s | took s |\n|---|--:|--:|--:|--:|--:|"
    rows = "\n".join("| " + " | ".join(_cells(one)) + " |" for one in _tallies)
    notes = "\n".join(f"- {one.fault}: {one.note}" for one in _tallies if one.note)
    when = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        "# The fault matrix\n\n"
        f"Written by `make nightly` on {when}, on {os.cpu_count()} CPU cores. What is promised, and how it is\n"
        "tested, is told in [reliability.md](reliability.md).\n\n"
        f"{head}\n{rows}\n\n{notes}\n"
    )
