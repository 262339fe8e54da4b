"""How tracing ends."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from streamflow.telemetry.traces import CLOSE_S

pytestmark = pytest.mark.timeout(60)

PROGRAM = """
import sys, time
from streamflow.telemetry.traces import open_tracing

tracing = open_tracing(sys.argv[1], service="test")
with tracing.request("Generate", None):
    pass
began_s = time.monotonic()
tracing.close()
print(time.monotonic() - began_s)
"""


def run(target: str) -> float:
    """Seconds that closing took."""
    command = [sys.executable, "-c", PROGRAM, target]
    folder = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=CLOSE_S + 10)
    return float(done.stdout)


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "away"])
def test_a_collector_that_takes_nothing_keeps_no_process(hangs: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as collector:
        port = collector.getsockname()[1]
        if not hangs:
            collector.close()
        assert run(f"http://127.0.0.1:{port}") < CLOSE_S + 1


def test_what_was_not_sent_is_sent_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "spans"
    run(f"file:{out}")
    assert '"name": "Generate"' in out.read_text()
