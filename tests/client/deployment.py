"""A gateway on loopback over a memory transport, and a worker that makes real (if plain) pictures.

It runs on an event loop in a thread of its own, so that clients that block can be tested, and can be taken away and
brought back on the same port.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
from PIL import Image

from gateway.models import Models, Served
from gateway.servicer import FOR_TENANTS, GatewayServicer
from streamflow.config import GatewaySettings
from streamflow.rpc import convert
from streamflow.rpc.server import RpcServer, Service
from streamflow.telemetry import Counters
from streamflow.transport.base import Entry, Limits
from streamflow.transport.memory import MemoryTransport
from streamflow.types import Failure, ImageFormat, JobState, Stage, WorkerInfo
from streamflow.v1 import gateway_pb2_grpc, types_pb2
from tests.cards import CARD
from tests.keys import api_keys

Answer = TypeVar("Answer")

PATIENCE_S = 20.0
DENOISER = WorkerInfo(
    "denoiser-a", Stage.DENOISE, "127.0.0.1:1", "shapes", "r1", "torch-eager", "cpu", 8, slots_in_use=3
)


class WatchedTransport(MemoryTransport):
    """Tells when somebody watches."""

    def __init__(self, *, limits: Limits) -> None:
        super().__init__(limits=limits)
        self.watched = asyncio.Event()

    @asynccontextmanager
    async def subscribe(self, job_id: str) -> AsyncIterator[AsyncIterator[bytes | None]]:
        async with super().subscribe(job_id) as wakes:
            self.watched.set()
            yield wakes


@dataclass
class Worker:
    """All stages. Image k is noise of its seed, as large as asked; it takes a permit before its first step."""

    transport: MemoryTransport
    permits: asyncio.Semaphore
    fail: dict[int, Failure] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    painted: list[str] = field(default_factory=list)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for stage in Stage:
                tasks.create_task(self._loop(stage), name=f"worker {stage}")

    async def _loop(self, stage: Stage) -> None:
        while True:
            for entry in await self.transport.read(stage, f"{stage}-1", 8, block_s=0.5):
                await getattr(self, f"_{stage}")(entry)

    async def _encode(self, entry: Entry) -> None:
        await self.transport.advance(entry, Stage.DENOISE, {}, warnings=self.warnings)

    async def _denoise(self, entry: Entry) -> None:
        await self.permits.acquire()
        request = types_pb2.JobSpec.FromString(await self.transport.spec(entry.ref.job_id)).request
        for step in range(1, request.steps + 1):
            event = convert.progress_event(entry.ref.index, step=step, steps=request.steps)
            await self.transport.publish(entry.ref.job_id, event)
            if request.preview_interval_steps and step % request.preview_interval_steps == 0:
                jpeg = picture(step, 16, 16, "JPEG")
                event = convert.preview_event(entry.ref.index, step=step, jpeg=jpeg, width=16, height=16)
                await self.transport.publish(entry.ref.job_id, event)
        await self.transport.advance(entry, Stage.DECODE, {})

    async def _decode(self, entry: Entry) -> None:
        spec = types_pb2.JobSpec.FromString(await self.transport.spec(entry.ref.job_id))
        self.painted.append(str(entry.ref))
        await self.transport.finish(entry, self.fail.get(entry.ref.index) or paint(spec.request, entry.ref.index))


def paint(request: types_pb2.GenerateRequest, index: int) -> bytes:
    seed = (request.seed + index) % 2**64
    kind = convert.format_from_pb(request.output.format)
    info = types_pb2.ImageInfo(
        index=index,
        seed=seed,
        format=request.output.format,
        width=request.width,
        height=request.height,
        steps=request.steps,
        sampler=request.sampler,
        timings=types_pb2.Timings(waiting_ms=1, encode_ms=2, denoise_ms=3 + index, decode_ms=4),
    )
    data = picture(seed, request.width, request.height, kind.value)
    return types_pb2.StoredImage(info=info, data=data).SerializeToString()


def noise(seed: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def picture(seed: int, width: int, height: int, kind: str) -> bytes:
    pixels = noise(seed, width, height)
    if kind == ImageFormat.RAW:
        return pixels.tobytes()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"compress_level": 1} if kind == "png" else {}))
    return out.getvalue()


class Deployment:
    """Use as a context manager, from the test's thread.

    Args:
        permits: images that the worker may begin before `allow` is called.
    """

    def __init__(
        self, *, permits: int = 1000, max_jobs: int = 100, keys: str = "", watch_lease_s: float = 15.0
    ) -> None:
        self._limits, self._keys, self._watch_lease_s = Limits(max_jobs=max_jobs), keys, watch_lease_s
        self._permits = permits
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="deployment")
        self._thread.start()
        try:
            self.call(self._start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.call(self._leave())
        finally:
            self._end()

    def call(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Runs a coroutine on the deployment's loop, from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def allow(self, images: int) -> None:
        for _ in range(images):
            self._loop.call_soon_threadsafe(self.worker.permits.release)

    def kill_gateway(self) -> None:
        """Every connection breaks, and nobody listens any more."""
        self.call(self._kill_gateway())

    def start_gateway(self, *, forget: bool = False) -> None:
        """On the port of before. `forget` empties the store first, as FLUSHALL would."""
        self.call(self._start_gateway(forget))

    def state(self, request_id: str) -> JobState:
        async def ask() -> JobState:
            return (await self.transport.job(request_id)).state

        return self.call(ask())

    def wait_for(self, request_id: str, state: JobState) -> None:
        async def wait() -> None:
            async with asyncio.timeout(PATIENCE_S), self.transport.subscribe(request_id) as wakes:
                while (await self.transport.job(request_id)).state is not state:
                    await anext(wakes)

        self.call(wait())

    def wait_for_watcher(self) -> None:
        self.call(self._wait_for_watcher())

    async def _wait_for_watcher(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.transport.watched.wait()

    async def _start(self) -> None:
        self._begin(WatchedTransport(limits=self._limits))
        await self._start_gateway(forget=False)

    def _begin(self, transport: WatchedTransport) -> None:
        self.transport = transport
        self.worker = Worker(transport, asyncio.Semaphore(self._permits))
        self._work = asyncio.create_task(self.worker.run(), name="worker")

    async def _start_gateway(self, forget: bool) -> None:
        if forget:
            await self._stop_worker()
            self._begin(WatchedTransport(limits=self._limits))
        settings = GatewaySettings(
            host="127.0.0.1", port=self.port, reap_interval_s=0.1, drain_grace_s=0.2, watch_lease_s=self._watch_lease_s
        )
        counters, keys = Counters(), api_keys(self._keys)
        models = Models([Served.over(self.transport, card=CARD, settings=settings, counters=counters)])
        servicer = GatewayServicer(models, settings=settings, keys=keys, counters=counters)
        name = "streamflow.v1.Gateway"
        service = Service(name, gateway_pb2_grpc.add_GatewayServicer_to_server, servicer, FOR_TENANTS)
        server = RpcServer(settings, services=[service], keys=keys, on_drain=models.drain)
        await self.transport.register(DENOISER, lease_s=600)
        await server.__aenter__()
        self.server, self.port = server, server.port
        self._upkeep = asyncio.create_task(_reap(self.transport), name="reap")

    async def _kill_gateway(self) -> None:
        await _cancel(self._upkeep)
        # As the context is left by an error: calls are cut at once.
        await self.server.__aexit__(RuntimeError, RuntimeError("killed"), None)

    async def _stop_worker(self) -> None:
        await _cancel(self._work)
        await self.transport.close()

    async def _leave(self) -> None:
        await self._kill_gateway()
        await self._stop_worker()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()


async def _reap(transport: MemoryTransport) -> None:
    while True:
        await transport.reap()
        await asyncio.sleep(0.1)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and task.exception() is not None:
        raise RuntimeError(f"{task.get_name()} failed") from task.exception()


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, name="client")
    thread.start()
    return thread
