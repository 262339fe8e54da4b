"""`python -m services.decoder` as a real process on a real Redis."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamflow.config import child_environment
from streamflow.families import describe
from streamflow.stages.imaging import decode_rgb
from streamflow.transport import codec
from streamflow.transport.base import ImageRef, NewJob
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import JobState, ModelCard, Stage, WorkerInfo
from streamflow.v1 import decoder_pb2, decoder_pb2_grpc, types_pb2

REPOSITORY = Path(__file__).parent.parent.parent
PATIENCE_S = 90.0

Decoder = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def decoder(redis: EmbeddedRedis, sd_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    settings = {"redis_url": redis.url, "model": sd_checkpoint, "threads": 1, "drain_grace_s": 5.0, "device": "cpu"}
    log = tmp_path_factory.mktemp("decoder") / "log"
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "services.decoder"],
            env=child_environment(settings),
            cwd=REPOSITORY,
            stderr=stderr,
        ) as process,
    ):
        yield process
        process.kill()
    print(log.read_text())  # shown when a test failed


@asynccontextmanager
async def connected(redis: EmbeddedRedis, card: ModelCard) -> AsyncIterator[RedisTransport]:
    transport = RedisTransport.from_url(redis.url, revision=card.revision)
    try:
        yield transport
    finally:
        await transport.close()


async def registered(transport: RedisTransport, process: Decoder) -> WorkerInfo:
    """The decoder's entry in the registry, which tells its address."""
    async with asyncio.timeout(PATIENCE_S):
        while not (workers := await transport.workers()):
            assert process.poll() is None, "the decoder ended"
            await asyncio.sleep(0.1)
    [worker] = workers
    return worker


async def healthy(channel: grpc.aio.Channel, service: str, expected: int) -> None:
    """Returns once the health service says so."""
    async with asyncio.timeout(PATIENCE_S):
        async for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service)):
            if response.status == expected:
                return


async def finished(transport: RedisTransport, ref: ImageRef) -> types_pb2.StoredImage:
    async with asyncio.timeout(PATIENCE_S):
        while not (await transport.job(ref.job_id)).state.terminal:  # noqa: ASYNC110 Redis is what tells
            await asyncio.sleep(0.05)
    assert (await transport.job(ref.job_id)).state is JobState.IMAGES
    return types_pb2.StoredImage.FromString(await transport.result(ref) or b"")


async def offer(transport: RedisTransport, card: ModelCard, latents: np.ndarray) -> ImageRef:
    """Puts an image where a denoiser would have put it."""
    request = types_pb2.GenerateRequest(
        prompts=["a"], steps=1, guidance_scale=1.0, sampler="euler", seed=3, width=64, height=64
    )
    spec = types_pb2.JobSpec(request=request, model_revision=card.revision).SerializeToString()
    await transport.admit(NewJob("job", "digest", spec, num_images=1))
    [entry] = await transport.read(Stage.ENCODE, "the-test", 1)
    assert await transport.advance(entry, Stage.DECODE, {"latents": codec.encode(latents)})
    return entry.ref


async def test_a_decoder_serves_decodes_drains_and_ends_in_order(
    redis: EmbeddedRedis, decoder: Decoder, sd_checkpoint: Path
) -> None:
    card = describe(sd_checkpoint)
    latents = np.random.default_rng(0).standard_normal((4, 16, 16), np.float32)
    async with connected(redis, card) as transport:
        ref = await offer(transport, card, latents)
        worker = await registered(transport, decoder)
        assert (worker.stage, worker.model_revision, worker.device) == (Stage.DECODE, card.revision, "cpu")
        async with grpc.aio.insecure_channel(worker.address) as channel:
            await healthy(channel, "liveness", health_pb2.HealthCheckResponse.SERVING)
            await healthy(channel, "streamflow.v1.Decoder", health_pb2.HealthCheckResponse.SERVING)
            stub = decoder_pb2_grpc.DecoderStub(channel)
            stored = await finished(transport, ref)
            direct = await stub.Decode(decoder_pb2.DecodeRequest(latents=codec.to_pb(latents)))
            from_stream, from_call = (decode_rgb(data, size=(64, 64)) for data in (stored.data, direct.data))
            assert np.array_equal(from_stream, from_call)
            status = await stub.Status(types_pb2.StatusRequest())
            assert (status.stage, status.worker_id, status.backlog) == ("decoder", worker.worker_id, 0)
            assert status.counters["ended_total"] == 1
            assert status.counters["rows_total"] == 2
            await check_end(decoder, channel, stub)
        assert await transport.workers() == []


async def check_end(decoder: Decoder, channel: grpc.aio.Channel, stub: decoder_pb2_grpc.DecoderStub) -> None:
    """Drain, then SIGTERM: exit 0, and no child is left."""
    children = psutil.Process(decoder.pid).children(recursive=True)
    assert children
    torch = [child for child in children if any("libtorch" in mapped.path for mapped in child.memory_maps())]
    assert torch == []
    await stub.Drain(types_pb2.DrainRequest(grace_s=1.0))
    assert (await stub.Status(types_pb2.StatusRequest())).draining
    await healthy(channel, "streamflow.v1.Decoder", health_pb2.HealthCheckResponse.NOT_SERVING)
    decoder.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(decoder.wait, PATIENCE_S) == 0
    assert psutil.wait_procs(children, timeout=10)[1] == []
