"""What `streamflow top` shows."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
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


def shown(now: Look, before: Look, *, width: int = 100, lines: int = 40) -> list[str]:
    console = Console(width=width, height=lines, record=True, file=io.StringIO())
    console.print(frame(now, before, width=width, lines=lines))
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
    assert "waiting 5 high (oldest 2.2 s), 7 (oldest 9.0 s)  >  encode 0  >  denoise 3 (oldest 0.5 s)" in text
    assert "draining" in text
    (mine,) = [line for line in text.splitlines() if "mine:2" in line]
    assert mine.split()[-3:] == ["625.0", "euler", "1a2b3c4d"]
    assert "3/8" in mine
    assert "(another tenant's, or direct)" in text
    assert "shapes waits" in text


def test_what_does_not_fit_on_the_terminal_is_counted() -> None:
    many = replace(DENOISER, work=tuple(SlotWork(f"job{k}", 0, 1, 4, 750.0, "euler") for k in range(50)))
    status = replace(STATUS, stages=(many,))
    lines = shown(Look(status, 1.0), Look(status, 1.0), lines=24)
    assert len(lines) <= 24
    visible = sum("job" in line for line in lines)
    assert visible >= 5
    assert any(f"and {50 - visible} more" in line for line in lines)


@pytest.mark.parametrize("width", [60, 72, 79, 80, 95, 96, 120])
def test_numbers_are_never_cut(width: int) -> None:
    work = [SlotWork("06f1b95ff0f244fa96c8ee0806f1b95f", k, 11, 14, 1000.0, "pseudo_corrector") for k in range(64)]
    denoiser = replace(DENOISER, slots=64, slots_in_use=64, image_ms=1010.0, work=tuple(work))
    decoders = [replace(DECODER, worker_id=f"decoder-{k:08}") for k in range(4)]
    status = replace(STATUS, stages=(denoiser, *decoders))
    lines = shown(Look(later(status), 14.0), Look(status, 10.0), width=width, lines=40)
    assert len(lines) <= 40
    words = [line.split() for line in lines]
    assert "15 images to do" in " ".join(" ".join(line) for line in words)
    [first] = [line for line in words if line[:2] == ["denoiser", "1a2b3c4d"]]
    assert first[-4:] == ["64/64", "5.0", "1010", "1:02:03"]
    assert sum(line[-4:] == ["0/4", "5.0", "1010", "1:02:03"] or line[-1:] == ["draining"] for line in words) == 4
    images = [line for line in words if line and line[0].startswith("06f1b95f")]
    assert [line[0].rpartition(":")[2] for line in images] == [str(k) for k in range(len(images))]
    assert len(images) >= 10
    assert all(line[-4:] == ["11/14", "1000.0", "pseudo_corrector", "1a2b3c4d"] for line in images)
    assert any("█" in line for line in lines) == (width >= 96)


def test_without_a_terminal_every_look_is_written_at_once() -> None:
    command = [sys.executable, "-m", "streamflow.cli", "top", "--interval", "0.2"]
    with Deployment() as deployment:
        environment = {**os.environ, "STREAMFLOW_ADDRESS": deployment.address}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            looks = 0
            while looks < 3:
                looks += process.stdout.readline().startswith("StreamFlow ")
            process.terminate()


def test_a_gateway_that_is_away_for_a_moment_does_not_end_it() -> None:
    command = [sys.executable, "-m", "streamflow.cli", "top", "--interval", "0.2"]
    terminal, of_process = os.openpty()
    with Deployment() as deployment, open(terminal, "rb", buffering=0) as screen:
        environment = {
            **os.environ,
            "STREAMFLOW_ADDRESS": deployment.address,
            "TERM": "xterm",
            "COLUMNS": "120",
            "LINES": "40",
        }
        frames = screen_frames(screen)
        with subprocess.Popen(command, env=environment, stdin=of_process, stdout=of_process) as process:
            os.close(of_process)
            try:
                assert "as it was" not in next(frames)
                deployment.kill_gateway()
                # Or that it does not answer, where the time for one more attempt was short.
                stale = next(frame for frame in frames if f"{deployment.address}: the connection was lost" in frame)
                assert "as it was" in stale
                assert "denoiser" in stale
                deployment.start_gateway()
                assert "denoiser" in next(frame for frame in frames if "as it was" not in frame)
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 0
            finally:
                process.kill()


def screen_frames(screen: io.RawIOBase) -> Iterator[str]:
    """What is drawn on a terminal, from one title to the next."""
    text = ""
    while True:
        text += screen.read(65536).decode("utf-8", "replace")
        # Attributes of characters.
        *whole, text = re.split("(?=StreamFlow )", re.sub("\x1b\\[[0-9;]*m", "", text))
        yield from (frame for frame in whole if frame.startswith("StreamFlow"))


def test_what_looks_like_markup_is_told_as_it_is() -> None:
    work = (SlotWork("mine", 0, 3, 8, 625.0, "perflow[windows=4,exact=true]"),)
    status = replace(STATUS, stages=(replace(DENOISER, work=work),))
    text = "\n".join(shown(Look(status, 1.0), Look(status, 1.0)))
    assert "perflow[windows=4,exact=true]" in text


def test_an_idle_deployment_without_replicas_is_shown_too() -> None:
    empty = replace(STATUS, stages=(), queues=(), waiting=0)
    text = "\n".join(shown(Look(empty, 1.0), Look(empty, 1.0)))
    assert text.count("shapes waits") == 3


def test_a_terminal_that_knows_ascii_alone_is_enough() -> None:
    command = [sys.executable, "-m", "streamflow.cli", "top", "--frames", "1"]
    with Deployment() as deployment:
        environment = {
            **os.environ,
            "STREAMFLOW_ADDRESS": deployment.address,
            "PYTHONIOENCODING": "ascii",
            "COLUMNS": "100",
        }
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert "####........ 3/8" in done.stdout.decode("ascii")
