"""What `streamflow top` shows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace

from rich.console import Console

from streamflow.cli.top import Look, frame
from streamflow.client import Queue, SlotWork, StageStatus, Status
from tests.client.deployment import Deployment

DENOISER = StageStatus(
    stage="denoiser",
    worker_id="denoiser-1a2b3c4d",
    model="shapes",
    model_revision="r1",
    backend="onnxruntime",
    device="cpu",
    slots=4,
    slots_in_use=3,
    backlog=3,
    draining=False,
    uptime_s=3723,
    call_ms=1.0,
    row_ms=2.0,
    row_counts=(),
    counters={"ended_total": 10},
    work=(SlotWork("mine", 2, 3, 8, 625.0, "euler"), SlotWork("", 0, 1, 4, 1000.0, "heun")),
    image_ms=41.6,
)
DECODER = replace(
    DENOISER, stage="decoder", worker_id="decoder-5e6f", slots_in_use=0, work=(), draining=True, image_ms=0.0
)
QUEUES = (
    Queue("shapes", "waiting", 1, 5, 2.25),
    Queue("shapes", "waiting", 0, 7, 9.0),
    Queue("shapes", "denoise", 0, 3, 0.5),
)
STATUS = Status((DECODER, DENOISER), 12, "shapes", ("shapes",), 60.0, {}, QUEUES)


def shown(now: Look, before: Look, *, lines: int = 40) -> list[str]:
    console = Console(width=100, height=lines, record=True, file=io.StringIO())
    console.print(frame(now, before, lines=lines))
    return console.export_text().splitlines()


def later(status: Status) -> Status:
    """The decoder and the denoiser have ended 20 more."""
    return replace(status, stages=tuple(replace(one, counters={"ended_total": 30}) for one in status.stages))


def test_rates_are_those_between_two_looks() -> None:
    lines = shown(Look(later(STATUS), 14.0), Look(STATUS, 10.0))
    assert "5.0 images/s" in lines[0]
    assert "15 images to do" in lines[0]
    (denoiser,) = [line for line in lines if line.strip().startswith("denoiser  ")]
    assert denoiser.split()[-3:] == ["5.0", "42", "1:02:03"]
    assert "3/4" in denoiser
    first = shown(Look(STATUS, 10.0), Look(STATUS, 10.0))
    assert "0.0 images/s" in first[0]


def test_queues_slots_and_what_is_missing_are_told() -> None:
    text = "\n".join(shown(Look(STATUS, 1.0), Look(STATUS, 1.0)))
    assert "waiting 5 high (2.2 s), 7 (9.0 s)  >  encode 0  >  denoise 3 (0.5 s)  >  decode 0" in text
    assert "draining" in text
    (mine,) = [line for line in text.splitlines() if "mine:2" in line]
    assert mine.split()[-3:] == ["625.0", "euler", "1a2b3c4d"]
    assert "3/8" in mine
    assert "(another tenant's, or direct)" in text
    assert "images of shapes wait" in text


def test_what_does_not_fit_on_the_terminal_is_counted() -> None:
    many = replace(DENOISER, work=tuple(SlotWork(f"job{k}", 0, 1, 4, 750.0, "euler") for k in range(50)))
    status = replace(STATUS, stages=(many,))
    lines = shown(Look(status, 1.0), Look(status, 1.0), lines=24)
    assert len(lines) <= 24
    visible = sum("job" in line for line in lines)
    assert visible >= 5
    assert any(f"and {50 - visible} more" in line for line in lines)


def test_what_looks_like_markup_is_told_as_it_is() -> None:
    work = (SlotWork("mine", 0, 3, 8, 625.0, "perflow[windows=4,exact=true]"),)
    status = replace(STATUS, stages=(replace(DENOISER, work=work),))
    text = "\n".join(shown(Look(status, 1.0), Look(status, 1.0)))
    assert "perflow[windows=4,exact=true]" in text


def test_an_idle_deployment_without_replicas_is_shown_too() -> None:
    empty = replace(STATUS, stages=(), queues=(), waiting=0)
    text = "\n".join(shown(Look(empty, 1.0), Look(empty, 1.0)))
    assert text.count("images of shapes wait") == 3


def test_a_terminal_that_knows_ascii_alone_is_enough() -> None:
    command = [sys.executable, "-m", "streamflow.cli", "top", "--frames", "1"]
    with Deployment() as deployment:
        environment = {**os.environ, "STREAMFLOW_ADDRESS": deployment.address, "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert "####........ 3/8" in done.stdout.decode("ascii")
