"""The stages' own calls: an operator's alone where keys are asked for, and silent about what is inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.decoder import servicer as decoder
from services.denoiser import servicer as denoiser
from services.encoder import servicer as encoder
from streamflow.config import StageSettings
from streamflow.families import describe
from streamflow.host.process import StageService, serve
from streamflow.ports import free_port
from streamflow.rpc.channels import key_metadata
from streamflow.transport import codec
from streamflow.transport.memory import MemoryTransport
from streamflow.types import Stage
from tests.faults.light_stage import LightStage
from tests.host.test_process import Idle
from tests.keys import key_lines
from tests.surface import call, methods, request_of, services, status

SERVICES = {encoder.NAME: (Stage.ENCODE, encoder), denoiser.NAME: (Stage.DENOISE, denoiser)}
SERVICES |= {decoder.NAME: (Stage.DECODE, decoder)}
KEYS = key_lines("key-alice alice\nkey-ops ops operator\n")


@asynccontextmanager
async def served(
    name: str,
    shapes: Path,
    keys: Path | None,
    *,
    light: LightStage | None = None,
    transport: MemoryTransport | None = None,
) -> AsyncIterator[grpc.aio.Channel]:
    """The stage's real service as its process has it, over a stage without networks."""
    stage, module = SERVICES[name]
    service: StageService[Any, Any] = StageService(
        stage, load=lambda settings: None, handler=lambda *_: Idle(), servicer=module.service
    )
    settings = StageSettings(model=shapes, port=free_port(), api_keys_file=keys, drain_grace_s=0.1)
    light, transport = light or LightStage(describe(shapes), 1), transport or MemoryTransport()
    process = asyncio.create_task(serve(service, light, settings, transport=transport, device="none"))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{settings.port}") as channel:
            # Health needs no key.
            asked = health_pb2.HealthCheckRequest(service=name)
            async for answer in health_pb2_grpc.HealthStub(channel).Watch(asked, wait_for_ready=True, timeout=20):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            yield channel
    finally:
        process.cancel()
        await asyncio.wait([process])


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text(KEYS)
    return tmp_path / "keys"


def test_every_service_is_looked_at() -> None:
    assert {*services()} == {*SERVICES, "streamflow.v1.Gateway"}


@pytest.mark.parametrize("name", SERVICES)
async def test_with_keys_every_method_takes_an_operators(name: str, shapes: Path, keys: Path) -> None:
    async with served(name, shapes, keys) as channel:
        for method in methods(name):
            request = request_of(method)
            assert await status(channel, method, request) == "UNAUTHENTICATED"
            assert await status(channel, method, request, key_metadata("key-eve")) == "UNAUTHENTICATED"
            assert await status(channel, method, request, key_metadata("key-alice")) == "PERMISSION_DENIED"
        by_name = {method.name: method for method in methods(name)}
        for one in (by_name["Status"], by_name["Drain"]):
            assert await status(channel, one, request_of(one), key_metadata("key-ops")) == "OK"


@pytest.mark.parametrize("name", SERVICES)
async def test_without_keys_they_are_open(name: str, shapes: Path) -> None:
    async with served(name, shapes, None) as channel:
        [method] = [method for method in methods(name) if method.name == "Status"]
        assert await status(channel, method, request_of(method)) == "OK"


class Broken(LightStage):
    """Whatever is asked of it fails, and says things that are nobody's business."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(INSIDE)


class BrokenTransport(MemoryTransport):
    async def backlog(self) -> dict[str, int]:
        raise RuntimeError(INSIDE)


INSIDE = "cannot open /srv/secret.pem at redis://user:hunter2@10.9.8.7:6379/0"
TELLTALES = ("Traceback", ".py", "/srv", "redis", "10.9.8.7", "hunter2", "RuntimeError")


@pytest.mark.parametrize("name", SERVICES)
async def test_internal_errors_are_told_neutrally(name: str, shapes: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage, transport = Broken(describe(shapes), 1), BrokenTransport()
    latents = codec.to_pb(np.zeros((4, 16, 16), np.float32))
    text = codec.tensors_to_pb({"prompt_embeds": np.zeros((4, 8), np.float32)})
    async with served(name, shapes, None, light=stage, transport=transport) as channel:
        for method in methods(name):
            request = request_of(
                method, prompts=["secret prompt"], latents=latents, conditioning=text, key="a", steps=2
            )
            code, told = await call(channel, method, request)
            assert code == ("OK" if method.name == "Drain" else "INTERNAL"), (method.name, told)
            assert not [word for word in TELLTALES if word.encode() in told]
    assert any(INSIDE in str(one.exc_info) for one in caplog.records), "the operator must be told"
    assert "secret prompt" not in caplog.text
