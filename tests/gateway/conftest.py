"""Gateways on loopback over a real transport, and a worker that makes real (if plain) pictures."""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio
import numpy as np
import pytest
from PIL import Image

from gateway.models import Models, Served
from gateway.servicer import FOR_TENANTS, GatewayServicer
from gateway.upkeep import keep_up
from streamflow.config import GatewaySettings
from streamflow.rpc import convert
from streamflow.rpc.channels import Target, open_aio_channel
from streamflow.rpc.server import RpcServer, Service
from streamflow.telemetry import Counters
from streamflow.transport.base import Entry, Limits, Transport
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.memory import MemoryTransport
from streamflow.transport.policy import Policy
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Failure, Stage
from streamflow.v1 import gateway_pb2_grpc, types_pb2
from tests.cards import CARD
from tests.keys import api_keys

NAME = "streamflow.v1.Gateway"
KEYS = "key-alice alice\nkey-bob bob\n"


@dataclass
class Worker:
    """All three stages: noise of the image's own seed, as a PNG; or what `fail` says instead.

    While `gate` is closed, images stay in the denoiser.
    """

    transport: Transport
    stop: asyncio.Event
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fail: dict[int, Failure] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    entries: list[Entry] = field(default_factory=list)
    specs: list[types_pb2.JobSpec] = field(default_factory=list)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for stage in Stage:
                tasks.create_task(self._loop(stage), name=f"worker {stage}")

    async def _loop(self, stage: Stage) -> None:
        while not self.stop.is_set():
            for entry in await self.transport.read(stage, f"{stage}-1", 8, block_s=0.2):
                self.entries.append(entry)
                await getattr(self, f"_{stage}")(entry)

    async def _encode(self, entry: Entry) -> None:
        await self.transport.advance(entry, Stage.DENOISE, {}, warnings=self.warnings)

    async def _denoise(self, entry: Entry) -> None:
        await self.gate.wait()
        event = convert.progress_event(entry.ref.index, step=1, steps=4)
        await self.transport.publish(entry.ref.job_id, event)
        await self.transport.advance(entry, Stage.DECODE, {})

    async def _decode(self, entry: Entry) -> None:
        spec = types_pb2.JobSpec.FromString(await self.transport.spec(entry.ref.job_id))
        self.specs.append(spec)
        await self.transport.finish(entry, self.fail.get(entry.ref.index) or paint(spec, entry.ref.index))


def paint(spec: types_pb2.JobSpec, index: int) -> bytes:
    request = spec.request
    seed = (request.seed + index) % 2**64
    noise = np.random.default_rng(seed).integers(0, 256, (request.height, request.width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    info = types_pb2.ImageInfo(index=index, seed=seed, width=request.width, height=request.height)
    return types_pb2.StoredImage(info=info, data=out.getvalue()).SerializeToString()


@dataclass
class Gateway:
    server: RpcServer
    channel: grpc.aio.Channel
    stub: gateway_pb2_grpc.GatewayStub


class Deployment:
    """One transport; `gateway()` starts as many gateways as a test wants."""

    def __init__(self, transport: Transport, stack: AsyncExitStack, tasks: asyncio.TaskGroup) -> None:
        self.transport = transport
        self._stop = asyncio.Event()
        self.worker = Worker(transport, self._stop)
        self._stack = stack
        self._tasks = tasks
        self._upkeep: list[asyncio.Task[None]] = []

    def start_worker(self, *, open_gate: bool = True) -> Worker:
        if open_gate:
            self.worker.gate.set()
        self.start(self.worker.run(), "worker")
        return self.worker

    def start(self, work: Any, name: str) -> asyncio.Task[None]:
        return self._tasks.create_task(work, name=name)

    def stop(self) -> None:
        self._stop.set()
        self.worker.gate.set()
        for task in self._upkeep:
            task.cancel()

    async def gateway(self, *, keys: str = "", more: Mapping[str, Deployment] | None = None, **options: Any) -> Gateway:
        """`more` are deployments of further models by name."""
        values = {"host": "localhost", "port": 0, "reap_interval_s": 0.1, "drain_grace_s": 0.5, **options}
        settings = GatewaySettings(**values)
        counters = Counters()
        known = api_keys(keys)
        cards = {CARD: self, **{replace(CARD, name=name): each for name, each in (more or {}).items()}}
        served = [
            Served.over(each.transport, card=card, settings=settings, counters=counters) for card, each in cards.items()
        ]
        models = Models(served)
        servicer = GatewayServicer(models, settings=settings, keys=known, counters=counters)
        service = Service(NAME, gateway_pb2_grpc.add_GatewayServicer_to_server, servicer, FOR_TENANTS)
        server = RpcServer(settings, services=[service], keys=known, on_drain=models.drain)
        await self._stack.enter_async_context(server)
        self._upkeep.append(self.start(keep_up(models, server, every_s=settings.reap_interval_s), "upkeep"))
        channel = await self._stack.enter_async_context(open_aio_channel(Target(server.address)))
        return Gateway(server, channel, gateway_pb2_grpc.GatewayStub(channel))


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture(params=["memory", "redis"])
def make_transport(request: pytest.FixtureRequest) -> Callable[[Limits, Policy], Transport]:
    """Both transports: what a gateway shows must not depend on which it is."""
    if request.param == "memory":
        return lambda limits, policy: MemoryTransport(limits=limits, policy=policy)
    url = request.getfixturevalue("redis_url")
    return lambda limits, policy: RedisTransport.from_url(
        url, deployment=secrets.token_hex(8), limits=limits, policy=policy
    )


@pytest.fixture
async def deploy(make_transport: Callable[[Limits, Policy], Transport]) -> AsyncIterator[Callable[..., Deployment]]:
    """`deploy(max_jobs=..., policy=...)` makes a deployment."""
    made: list[Deployment] = []
    # Left in this order: servers and channels, then the tasks, then what both use.
    async with AsyncExitStack() as transports, asyncio.TaskGroup() as tasks, AsyncExitStack() as servers:

        def make(*, policy: Policy | None = None, **limits: int) -> Deployment:
            transport = make_transport(Limits(**limits), policy or Policy())
            transports.push_async_callback(transport.close)
            made.append(Deployment(transport, servers, tasks))
            return made[-1]

        yield make
        for deployment in made:
            deployment.stop()


@pytest.fixture
def until() -> Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]:
    """Asks again until the answer is true; returns it."""

    async def wait(question: Callable[[], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(20):
            while not (answer := await question()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return answer

    return wait
