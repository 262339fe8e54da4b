"""How a stage's process ends when it cannot go on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from streamflow.config import StageSettings
from streamflow.errors import StreamFlowError, UnavailableError
from streamflow.families import describe
from streamflow.host import process
from streamflow.host.control import ControlServicer
from streamflow.host.process import StageService, run_stage, serve
from streamflow.rpc.server import Service
from streamflow.transport.handling import EntryContext, Outcome
from streamflow.transport.memory import MemoryTransport
from streamflow.types import Stage
from streamflow.v1 import denoiser_pb2_grpc
from tests.faults.light_stage import LightStage


class Ending(LightStage):
    """A stage that ends with an error, as the denoiser does when its engine has ended."""

    def __init__(self, shapes: Path, error: Exception) -> None:
        super().__init__(describe(shapes), 1)
        self.error, self.hung_after_s = error, inf

    async def watch(self, *, hung_after_s: float) -> None:
        self.hung_after_s = hung_after_s
        raise self.error


async def serve_without_server(
    service: StageService[Any, Any], stage: Any, settings: StageSettings, *, transport: Any, device: str
) -> None:
    """As `process.serve` does it, without server and worker."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stage.watch(hung_after_s=settings.progress_timeout_s), name="background")
        await asyncio.Event().wait()


class Idle:
    """A handler that nothing is given to."""

    counters: Mapping[str, int] = {}

    async def __call__(self, context: EntryContext) -> Outcome:
        raise AssertionError(context.entry)


def ending_service(shapes: Path, error: Exception) -> StageService[Any, Any]:
    class Servicer(ControlServicer, denoiser_pb2_grpc.DenoiserServicer):
        """Its status alone."""

    return StageService(
        Stage.DENOISE,
        load=lambda settings: Ending(shapes, error),
        handler=lambda stage, transport, settings: Idle(),
        servicer=lambda stage, control: Service(
            "streamflow.v1.Denoiser", denoiser_pb2_grpc.add_DenoiserServicer_to_server, Servicer(control)
        ),
    )


def run(shapes: Path, error: Exception) -> None:
    run_stage(ending_service(shapes, error), StageSettings(model=shapes))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", serve_without_server)
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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"redis_url": "redis://one@h:1/0", "redis_user": "another"}, "redis_user"),
        ({"redis_password_file": "empty"}, "it is empty"),
        ({"redis_url": "http://h:1"}, "redis_url"),
        ({"traces": "file:nowhere/traces"}, "traces"),
        ({"api_keys_file": "nowhere"}, "api_keys_file"),
    ],
)
def test_settings_that_no_stage_can_use_are_told_before_the_model_is_loaded(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()

    def load(settings: StageSettings) -> Ending:
        raise AssertionError("it was loaded")

    service = replace(ending_service(shapes, UnavailableError("")), load=load)
    with pytest.raises(SystemExit) as ended:
        run_stage(service, StageSettings(model=shapes, **wrong))
    assert ended.value.code == 2
    [record] = [record for record in caplog.records if record.message == "cannot run"]
    assert said in vars(record)["streamflow_fields"]["reason"]


def test_a_variable_that_was_to_turn_something_on_is_told_of(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Keys would be off without a word; the others belong to Compose, to clients and to somebody else.
    for name in ("STREAMFLOW_API_KEY_FILE", "STREAMFLOW_TAG", "STREAMFLOW_API_KEY", "STREAMFLOW_GATEWAY_KEYS_FILE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("STREAMFLOW_REDIS_MEMORY", "2g")
    with pytest.raises(SystemExit):
        run(shapes, UnavailableError("it has ended"))
    told = [record for record in caplog.records if record.message == "no setting has this name"]
    assert [vars(record)["streamflow_fields"] for record in told] == [
        {"variable": "STREAMFLOW_API_KEY_FILE", "meant": "STREAMFLOW_API_KEYS_FILE"}
    ]


def test_a_bug_keeps_its_traceback(shapes: Path) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        run(shapes, ArithmeticError("a bug"))
    assert raised.group_contains(ArithmeticError)


async def test_a_stage_that_can_do_no_more_ends_its_server(shapes: Path) -> None:
    """Well before what waits in it is handed back at the progress time-out."""
    service = ending_service(shapes, UnavailableError("the engine has ended"))
    settings = StageSettings(model=shapes, progress_timeout_s=10)
    stage = service.load(settings)
    with pytest.raises(ExceptionGroup) as raised:
        await serve(service, stage, settings, transport=MemoryTransport(), device="none")
    assert raised.group_contains(UnavailableError, match="the engine has ended")
    # It looks four times, or every second.
    assert 1 < stage.hung_after_s + min(1, stage.hung_after_s / 4) < 0.75 * settings.progress_timeout_s
