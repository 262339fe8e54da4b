"""A real deployment: Redis, the gateway and the stages as processes, with the built-in model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.pipeline import Pipeline
from streamflow.stages.imaging import encode_image
from streamflow.types import ImageFormat
from streamflow.v1 import decoder_pb2_grpc, denoiser_pb2_grpc, types_pb2

STUBS = {"denoiser": denoiser_pb2_grpc.DenoiserStub, "decoder": decoder_pb2_grpc.DecoderStub}


@dataclass(frozen=True)
class Wish:
    """A request, for the client and for the fused pipeline alike."""

    prompt: str
    options: Mapping[str, Any] = field(default_factory=dict)

    async def ask(self, client: AsyncClient, **more: Any) -> list[bytes]:
        return list((await client.generate(self.prompt, **self.options, **more)).files)

    def fuse(self, pipeline: Pipeline) -> list[bytes]:
        pixels = pipeline(self.prompt, output="np", **self.options).images
        return [encode_image(one, ImageFormat.PNG) for one in pixels]


COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def wishes(count: int, *, first_seed: int = 0) -> list[Wish]:
    """Requests that differ in prompt, steps, guidance and seed."""
    return [
        Wish(
            f"a {('small', 'large')[k % 2]} {COLOURS[k % 7]} {SHAPES[k % 6]} on a white background",
            {
                "steps": (1, 4, 2, 8, 3)[k % 5],
                "guidance_scale": (1.0, 3.0)[k % 2],
                "seed": first_seed + 100 * k,
                **({"negative_prompt": "a black square"} if k % 4 == 1 else {}),
            },
        )
        for k in range(count)
    ]


async def counters(deployment: LocalDeployment, name: str) -> dict[str, int]:
    """What a stage process says that it has done."""
    stub = STUBS[name.partition("-")[0]]
    async with grpc.aio.insecure_channel(deployment.addresses[name]) as channel:
        status = await stub(channel).Status(types_pb2.StatusRequest(), timeout=10)
    return dict(status.counters)


@pytest.fixture(scope="session")
def fused(shapes: Path) -> Pipeline:
    return Pipeline.from_pretrained(shapes, device="cpu", deterministic=True)


@pytest.fixture(scope="session")
def spans_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes of the deployment write what they trace."""
    return tmp_path_factory.mktemp("traces") / "spans.jsonl"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def deployment(shapes: Path, spans_file: Path) -> AsyncIterator[LocalDeployment]:
    """One encoder, one denoiser and two decoders in deterministic mode, with metrics and traces."""
    # A short lease, so that what a killed process held is taken over quickly.
    settings = {"device": "cpu", "lease_s": 2.0, "metrics_port": 0, "traces": f"file:{spans_file}"}
    async with LocalDeployment(model=shapes, decoders=2, deterministic=True, settings=settings) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(deployment: LocalDeployment) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(deployment.address) as connected:
        yield connected
