"""How processes end; see tests/cli/test_process.py for those that are started by another one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streamflow.config import child_environment

ROOT = Path(__file__).parent.parent
# A process that is the first of its container.
CONTAINED = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
PATIENCE_S = 60.0


def until(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)


def child_of(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


def catches_sigterm(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [caught] = [line.split()[1] for line in lines if line.startswith("SigCgt")]
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*CONTAINED, "true"], capture_output=True).returncode != 0,
    reason="needs processes with numbers of their own, and `unshare` may not make them here",
)
@pytest.mark.parametrize("module", ["gateway", "services.encoder", "services.denoiser", "services.decoder"])
def test_the_first_process_of_a_container_ends_when_told_while_it_starts(module: str, shapes: Path) -> None:
    settings = {"model": shapes, "redis_url": "redis://127.0.0.1:1/0", "port": 0, "device": "cpu"}
    command = [*CONTAINED, sys.executable, "-m", module]
    with subprocess.Popen(
        command, cwd=ROOT, env=child_environment(settings), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until(lambda: child_of(process.pid))
            first = child_of(process.pid)
            assert first is not None
            # Before it did, the kernel would keep the signal from it, and it would go on to serve.
            until(lambda: catches_sigterm(first))
            os.kill(first, signal.SIGTERM)
            _, told = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, told
    for line in ("serving", "loaded"):
        assert f'"{line}"' not in told
