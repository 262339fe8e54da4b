"""How a stage's process ends when it cannot go on."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from streamflow.config import StageSettings
from streamflow.errors import StreamFlowError, UnavailableError
from streamflow.families import describe
from streamflow.host import process
from streamflow.host.process import StageService, run_stage
from streamflow.types import Stage
from tests.faults.light_stage import LightStage


class Ending:
    """A handler whose background task ends with an error, as the denoiser's does when its engine has ended."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def watch(self) -> None:
        raise self.error


async def serve(service: StageService[Any, Any], stage: Any, settings: Any, *, transport: Any, device: str) -> None:
    """As `process.serve` does it, without server and worker."""
    handler = service.handler(stage, transport, settings)
    assert service.background is not None
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(service.background(handler, None), name="background")  # type: ignore[arg-type]
        await asyncio.Event().wait()


def run(shapes: Path, error: Exception) -> None:
    service: StageService[Any, Any] = StageService(
        Stage.DENOISE,
        load=lambda settings: LightStage(describe(settings.model), 1),
        handler=lambda stage, transport, settings: Ending(error),  # type: ignore[arg-type, return-value]
        servicer=lambda stage, control: None,  # type: ignore[arg-type, return-value]
        background=lambda handler, worker: handler.watch(),
    )
    run_stage(service, StageSettings(model=str(shapes)))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", serve)
    monkeypatch.setattr(process, "configure_logging", lambda **_: None)
    # Of this process, for all tests that follow.
    monkeypatch.setattr("streamflow.backends.runtime.set_threads", lambda *_, **__: 1)


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("the engine has ended"),
        ExceptionGroup("tasks", [ExceptionGroup("more", [StreamFlowError("the engine has ended")])]),
    ],
)
def test_a_background_task_that_ends_is_told_in_one_line(
    shapes: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as ended:
        run(shapes, error)
    assert ended.value.code == 1
    (record,) = caplog.records
    assert "cannot run" in record.getMessage()
    assert record.exc_info is None


def test_a_bug_keeps_its_traceback(shapes: Path) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        run(shapes, ArithmeticError("a bug"))
    assert raised.group_contains(ArithmeticError)
