"""What every service's server does: bytes, health, keys, TLS, drain."""

from __future__ import annotations

import asyncio
import signal
import sys
import textwrap

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from streamflow.config import Settings
from streamflow.errors import InvalidRequestError, UnauthenticatedError, UnavailableError
from streamflow.ports import free_port
from streamflow.rpc.channels import Target, key_metadata, open_aio_channel, open_channel
from streamflow.rpc.errors import from_rpc_error
from streamflow.rpc.probe import is_ready
from streamflow.rpc.server import RpcServer
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.keys import api_keys

pytestmark = pytest.mark.timeout(60)

NAME = "streamflow.v1.Gateway"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

BAD_BYTES = {
    "invalid UTF-8": b"\x0a\x02\xff\xfe",
    "truncated": b"\x0a\x20abc",
    "wrong wire type": b"\x0f",
    "random": bytes(range(255, 0, -1)),
}


async def health(channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def get_job(channel, **kwargs) -> str:
    stub = gateway_pb2_grpc.GatewayStub(channel)
    try:
        return (await stub.GetJob(gateway_pb2.GetJobRequest(request_id="x"), **kwargs)).request_id
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@pytest.mark.parametrize("data", BAD_BYTES.values(), ids=BAD_BYTES.keys())
@pytest.mark.parametrize("method", ["GetJob", "Watch", "Generate"])
async def test_bytes_that_are_no_message_are_the_callers_mistake(serve, method, data):
    async with serve() as (_, channel):
        path = f"/{NAME}/{method}"
        call = channel.unary_unary(path)(data) if method == "GetJob" else anext(aiter(channel.unary_stream(path)(data)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(from_rpc_error(caught.value), InvalidRequestError)
    assert "UTF-8" in caught.value.details()


async def test_liveness_is_apart_from_readiness(serve):
    async with serve() as (server, channel):
        assert await health(channel, "") == await health(channel, "liveness") == SERVING
        assert await health(channel, NAME) == NOT_SERVING
        await server.set_ready(True)
        assert await health(channel, NAME) == SERVING
        await server.set_ready(False)
        assert await health(channel, NAME) == NOT_SERVING
        assert await health(channel, "") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_health_watcher_hears_of_the_drain_and_does_not_hold_it_up(serve):
    async with serve(drain_grace_s=50) as (server, channel):
        await server.set_ready(True)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME))
        told = aiter(watch)
        assert (await anext(told)).status == SERVING
        draining = asyncio.create_task(server.drain())
        assert [message.status async for message in told] == [NOT_SERVING]
        await asyncio.wait_for(draining, 20)


async def test_calls_under_way_finish_while_new_ones_are_refused(serve, servicer):
    drained: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def on_drain(grace_s: float) -> None:
        drained.set_result(grace_s)

    async with serve(on_drain=on_drain) as (server, channel):
        await server.set_ready(True)
        stub = gateway_pb2_grpc.GatewayStub(channel)
        events = aiter(stub.Generate(types_pb2.GenerateRequest(request_id="x")))
        assert (await anext(events)).request_id == "x"
        draining = asyncio.create_task(server.drain())
        assert await drained == 5.0
        async with open_aio_channel(Target(server.address)) as other:
            with pytest.raises(UnavailableError):
                await get_job(other)
        assert not draining.done()
        servicer.release.set()
        assert [event async for event in events] == []
        await draining


async def test_a_call_that_never_ends_is_cut_after_the_grace_period(serve, servicer):
    async with serve(drain_grace_s=0) as (server, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        events = aiter(stub.Generate(types_pb2.GenerateRequest(request_id="x")))
        await anext(events)
        await asyncio.wait_for(server.drain(), 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(events)
        # Not as if a job had been cancelled: the client tries again elsewhere.
        assert isinstance(from_rpc_error(caught.value), UnavailableError)


async def test_whoever_drains_as_well_waits_until_it_has_stopped(serve, servicer):
    async with serve() as (server, channel):
        events = aiter(gateway_pb2_grpc.GatewayStub(channel).Generate(types_pb2.GenerateRequest()))
        await anext(events)
        drains = [asyncio.create_task(server.drain()) for _ in range(2)]
        done, _ = await asyncio.wait(drains, timeout=0.2)
        assert not done
        drains[0].cancel()
        servicer.release.set()
        await drains[1]
        assert [event async for event in events] == []


async def test_a_port_that_is_taken_is_reported(serve):
    async with serve() as (server, _):
        with pytest.raises(UnavailableError, match="choose another"):
            async with RpcServer(Settings(host="localhost", port=server.port), services=[]):
                pass


@pytest.mark.parametrize(
    ("host", "keys", "warned"), [("127.0.0.1", "", 0), ("0.0.0.0", "", 1), ("0.0.0.0", "key-one alice\n", 0)]
)
async def test_the_log_says_who_may_call(serve, caplog, host, keys, warned):
    with caplog.at_level("INFO"):
        async with serve(host=host, keys=api_keys(keys)):
            pass
    [line] = [one for one in caplog.records if one.message == "serving"]
    assert line.streamflow_fields["keys"] == ("on" if keys else "off")
    assert sum("no keys" in one.message for one in caplog.records) == warned


async def test_reflection_only_when_asked_for(serve):
    def services(address: str) -> list[str]:
        with open_channel(Target(address)) as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    async with serve() as (server, _):
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(services, server.address)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with serve(reflection=True) as (server, _):
        assert NAME in await asyncio.to_thread(services, server.address)


KEYS = api_keys("key-one alice\nkey-two bob\n")


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        key_metadata("wrong"),
        (("authorization", "key-one"),),
        (("authorization", "Basic key-one"),),
        (("authorization", ""),),
    ],
)
async def test_calls_without_a_known_key_are_refused(serve, metadata):
    async with serve(keys=KEYS, reflection=True) as (_, channel):
        with pytest.raises(UnauthenticatedError) as caught:
            await get_job(channel, metadata=metadata)
        assert "key-one" not in str(caught.value)
        events = aiter(gateway_pb2_grpc.GatewayStub(channel).Watch(gateway_pb2.WatchRequest(), metadata=metadata))
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            await anext(events)
        assert stream.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_health_needs_no_key_and_a_known_key_opens_the_rest(serve):
    async with serve(keys=KEYS) as (_, channel):
        assert await health(channel, "") == SERVING
        assert await get_job(channel, metadata=key_metadata("key-two")) == "x"


async def test_reflection_needs_an_operators_key(serve):
    def services(address: str, *metadata: tuple[str, str]) -> list[str]:
        with open_channel(Target(address)) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            [answer] = stub.ServerReflectionInfo(iter([asked]), metadata=metadata)
            return [service.name for service in answer.list_services_response.service]

    keys = api_keys("key-one alice\nkey-ops ops operator\n")
    async with serve(keys=keys, reflection=True) as (server, _):
        for metadata, code in (((), "UNAUTHENTICATED"), (key_metadata("key-one"), "PERMISSION_DENIED")):
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.to_thread(services, server.address, *metadata)
            assert caught.value.code().name == code
        assert NAME in await asyncio.to_thread(services, server.address, *key_metadata("key-ops"))


async def test_probes_need_no_tls_on_a_port_that_answers_nothing_else(serve):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    encrypted = {
        "credentials": grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)]),
        "root_ca": authority.cert_pem.bytes(),
    }
    port = free_port("localhost")
    async with serve(**encrypted, keys=api_keys("key-one alice\n"), health_port=port) as (server, _):
        await server.set_ready(True)
        assert not await asyncio.to_thread(is_ready, server.address, NAME)
        assert await asyncio.to_thread(is_ready, f"localhost:{port}", NAME)
        async with open_aio_channel(Target(f"localhost:{port}")) as plain:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await plain.unary_unary(f"/{NAME}/GetJob")(b"", metadata=key_metadata("key-one"))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_server_that_drains_still_tells_probes_that_it_lives(serve, servicer):
    port = free_port("localhost")
    async with open_aio_channel(Target(f"localhost:{port}")) as probe:
        async with serve(health_port=port) as (server, channel):
            await server.set_ready(True)
            events = aiter(gateway_pb2_grpc.GatewayStub(channel).Generate(types_pb2.GenerateRequest()))
            await anext(events)
            ready = aiter(health_pb2_grpc.HealthStub(probe).Watch(health_pb2.HealthCheckRequest(service=NAME)))
            assert (await anext(ready)).status == SERVING
            draining = asyncio.create_task(server.drain())
            assert (await anext(ready)).status == NOT_SERVING
            assert await health(probe, "liveness") == SERVING
            servicer.release.set()
            await draining
            assert [event async for event in events] == []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(probe, "liveness")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_health_port_that_is_taken_is_reported(serve):
    async with serve() as (server, _):
        with pytest.raises(UnavailableError, match=f"{server.port}.*health port 0 is none"):
            async with serve(health_port=server.port):
                pass


PROCESS = """
import asyncio
from streamflow.config import Settings
from streamflow.rpc.server import RpcServer
from streamflow.telemetry import configure_logging

async def main():
    configure_logging(level="info", log_format="json", service="test")
    async with RpcServer(Settings(port=0), services=[]) as server:
        print(server.port, flush=True)
        await server.run_until_stopped()

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_in_order(number):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(PROCESS), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    async with open_aio_channel(Target(f"127.0.0.1:{port}")) as channel:
        assert await health(channel, "") == SERVING
    process.send_signal(number)
    _, log = await process.communicate()
    assert process.returncode == 0
    assert [b'"draining"' in log, b'"stopped"' in log, b"Traceback" in log] == [True, True, False]
