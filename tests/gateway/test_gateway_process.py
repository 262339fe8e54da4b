"""`python -m gateway` as a process, over a real Redis."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc.aio
import psutil
import pytest
import redis.asyncio as redis
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.__main__ import main
from streamflow.client import AsyncClient
from streamflow.errors import StreamFlowError, UnavailableError
from streamflow.rpc.channels import Target, key_metadata, open_aio_channel
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.keys import key_lines

pytestmark = pytest.mark.timeout(120)

NAME = "streamflow.v1.Gateway"
CONFIGS = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
    "unet/config.json": {"in_channels": 4, "out_channels": 4, "sample_size": 8},
    "vae/config.json": {"block_out_channels": [8, 8, 8, 8]},
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "tokenizer/tokenizer_config.json": {"model_max_length": 77},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What the gateway reads of a checkpoint: its configs, and that weights are there."""
    for name, config in CONFIGS.items():
        path = tmp_path / "tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))
        if path.name == "config.json":
            # No tensors.
            path.with_name("diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return tmp_path / "tiny"


class Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, object]] = []

    async def log(self, event: str) -> dict[str, object]:
        """The next line of this event; AssertionError when the process ends without it."""
        assert self.process.stderr is not None
        while text := await self.process.stderr.readline():
            self.lines.append(json.loads(text))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"no {event!r} in {self.lines}")


async def spawn(*options: object) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFLOW_")}
    command = [sys.executable, "-m", "gateway", *map(str, options)]
    return await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)


@pytest.fixture
def run(checkpoint: Path, redis_url: str) -> Callable[..., object]:
    @asynccontextmanager
    async def start(*options: object) -> AsyncIterator[tuple[Process, grpc.aio.Channel]]:
        given = ("--model", checkpoint, "--redis-url", redis_url, "--port", 0, *options)
        process = Process(await spawn(*given))
        try:
            address = str((await process.log("serving"))["address"])
            async with open_aio_channel(Target(address)) as channel:
                yield process, channel
        finally:
            if process.process.returncode is None:
                process.process.kill()
                await process.process.wait()

    return start


async def readiness(channel: grpc.aio.Channel) -> AsyncIterator[int]:
    async for message in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME)):
        yield message.status


async def test_it_serves_until_it_is_told_to_stop(run):
    async with run("--drain-grace-s", "0.2") as (process, channel):
        ready = readiness(channel)
        while await anext(ready) != health_pb2.HealthCheckResponse.SERVING:
            pass
        stub = gateway_pb2_grpc.GatewayStub(channel)
        model = (await stub.ListModels(gateway_pb2.ListModelsRequest())).models[0]
        assert (model.name, model.default_width, model.size_multiple) == ("tiny", 64, 8)
        secret = "a prompt that nobody else may read"
        job = await stub.Submit(types_pb2.GenerateRequest(prompts=[secret]))
        assert (await process.log("admitted"))["job"] == job.request_id
        process.process.send_signal(signal.SIGTERM)
        assert await anext(ready) == health_pb2.HealthCheckResponse.NOT_SERVING
        await process.log("stopped")
        assert await process.process.wait() == 0
        assert secret not in json.dumps(process.lines)


async def test_every_model_has_a_deployment_of_its_own(run, checkpoint, redis_url):
    options = ("--deployment", "several", "--more-models", f"other={checkpoint}")
    async with run(*options) as (process, channel), redis.Redis.from_url(redis_url) as store:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        models = (await stub.ListModels(gateway_pb2.ListModelsRequest())).models
        assert [(model.name, model.live) for model in models] == [("tiny", False), ("other", False)]
        for name, deployment in (("", "several"), ("other", "several-other")):
            job = await stub.Submit(types_pb2.GenerateRequest(prompts=["x"], model=name))
            assert (await process.log("admitted"))["model"] == job.model == (name or "tiny")
            assert await store.exists(f"sf:v1:{{{deployment}}}:job:{job.request_id}")


async def test_keys_come_from_a_file(run, tmp_path):
    (tmp_path / "keys").write_text(key_lines("key-alice alice\n"))
    async with run("--api-keys-file", tmp_path / "keys") as (process, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(gateway_pb2.ListModelsRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=key_metadata("key-alice"))).models
        # A key is exchanged while it serves.
        (tmp_path / "keys").write_text(key_lines("key-alice-2 alice\n"))
        assert (await process.log("api keys read again"))["keys"] == 1
        assert (await stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=key_metadata("key-alice-2"))).models
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=key_metadata("key-alice"))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_what_decodes_pictures_dies_with_a_killed_gateway(run):
    async with run() as (process, _):
        gateway = psutil.Process(process.process.pid)
        async with asyncio.timeout(30):
            while len(children := gateway.children()) < 2:  # noqa: ASYNC110 nothing tells when they are there
                await asyncio.sleep(0.05)
        process.process.kill()
        assert (await asyncio.to_thread(psutil.wait_procs, children, 10))[1] == []


async def test_without_redis_it_lives_but_is_not_ready(run, unused_tcp_port):
    async with run("--redis-url", f"redis://127.0.0.1:{unused_tcp_port}/0") as (process, channel):
        said = await process.log("transport takes no work")
        assert said["level"] == "warning"
        assert str(unused_tcp_port) in str(said["reason"])
        health = health_pb2_grpc.HealthStub(channel)
        expected = {"": health_pb2.HealthCheckResponse.SERVING, NAME: health_pb2.HealthCheckResponse.NOT_SERVING}
        for name, status in expected.items():
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == status
        models = (await gateway_pb2_grpc.GatewayStub(channel).ListModels(gateway_pb2.ListModelsRequest())).models
        assert [(model.name, model.live) for model in models] == [("tiny", False)]
        request = types_pb2.GenerateRequest(prompts=["x"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway_pb2_grpc.GatewayStub(channel).Submit(request, timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_is_told_what_a_gateway_without_redis_says(run, unused_tcp_port):
    async with run("--redis-url", f"redis://127.0.0.1:{unused_tcp_port}/0") as (process, _):
        client = AsyncClient(str(process.lines[-1]["address"]))
        with pytest.raises(StreamFlowError, match="the store cannot be used now"):
            await client.generate("x", timeout_s=5)
        await client.close()


async def test_the_log_is_its_own_whatever_peers_do(run, tmp_path):
    certificate = trustme.CA().issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    tls = ("--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem")
    async with run("--drain-grace-s", "0.2", *tls) as (process, _):
        host, _, port = str(process.lines[-1]["address"]).rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.read()
        writer.close()
        # By then it has taken over what SIGTERM does.
        await process.log("transport takes work")
        process.process.send_signal(signal.SIGTERM)
        # Which reads every line as JSON.
        await process.log("stopped")


async def test_it_ends_in_order_while_redis_hangs(run, checkpoint):
    others = ",".join(f"m{number}={checkpoint}" for number in range(3))
    with EmbeddedRedis() as redis:
        async with run("--redis-url", redis.url, "--more-models", others, "--drain-grace-s", "0.2") as (process, _):
            await process.log("transport takes work")
            os.kill(redis.pid, signal.SIGSTOP)
            try:
                # Until every model is being looked at.
                await asyncio.sleep(3)
                process.process.send_signal(signal.SIGTERM)
                await process.log("stopped")
                async with asyncio.timeout(5):
                    assert await process.process.wait() == 0
            finally:
                os.kill(redis.pid, signal.SIGCONT)


@contextmanager
def usual_log() -> Iterator[None]:
    """The log is as before afterwards; `main` sends it elsewhere."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "nowhere"), "the folder of a checkpoint"),
        (("--tls-cert", "only.pem"), "tls_key"),
        (("--port", "70000"), "65535"),
        (("--more-models", "rings=nowhere"), "nowhere"),
        (("--more-models", "tiny=nowhere"), "a name other than the default model's"),
        (("--api-keys-file", "nowhere"), "nowhere"),
        (("--no-such-option", "1"), "no-such-option"),
    ],
)
def test_a_setting_that_cannot_work_is_said_in_a_few_lines(checkpoint, capsys, options, said):
    with usual_log(), pytest.raises(SystemExit) as caught:
        main(["--model", str(checkpoint), *options])
    assert caught.value.code not in (0, None)
    assert said in f"{caught.value.code} {capsys.readouterr().err}"


def test_upkeep_that_cannot_go_on_ends_it_with_one_line(checkpoint, monkeypatch, unused_tcp_port):
    async def keep_up(*_: object, **__: object) -> None:
        raise UnavailableError("Redis is of another kind")

    monkeypatch.setattr("gateway.__main__.keep_up", keep_up)
    url = f"redis://127.0.0.1:{unused_tcp_port}/0"
    with usual_log(), pytest.raises(SystemExit) as caught:
        main(["--model", str(checkpoint), "--redis-url", url, "--port", "0"])
    assert caught.value.code == "gateway: Redis is of another kind"


async def test_it_never_imports_torch():
    code = "import sys, gateway.__main__; sys.exit('torch' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
