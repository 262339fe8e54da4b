"""What callers cannot make grow: the labels of metrics, the calls that are open, the requests that are in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamflow.errors import BusyError, DeadlineError, InvalidRequestError
from streamflow.rpc import interceptors
from streamflow.rpc.channels import key_metadata
from streamflow.rpc.errors import from_rpc_error
from streamflow.rpc.probe import is_ready
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.keys import api_keys

pytestmark = pytest.mark.timeout(60)

NAME = "streamflow.v1.Gateway"
KEYS = "key-alice alice\nkey-bob bob\nkey-carol carol\n"
ALICE, BOB, CAROL = (key_metadata(f"key-{name}") for name in ("alice", "bob", "carol"))


async def status(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def started(channel: grpc.aio.Channel, metadata: Any = ()) -> Any:
    """A Generate that has answered, and stays open."""
    call = gateway_pb2_grpc.GatewayStub(channel).Generate(types_pb2.GenerateRequest(), metadata=metadata)
    await call.read()
    return call


async def refused(channel: grpc.aio.Channel, metadata: Any = ()) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await started(channel, metadata)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    "metadata", [(), ALICE, key_metadata("key-ops")], ids=["no key", "a tenant's", "an operator's"]
)
async def test_methods_that_do_not_exist_are_told_of_as_one(serve, metadata):
    told: set[str] = set()
    known = asyncio.Event()

    def on_call(method: str, code: str, seconds: float) -> None:
        told.add(method)
        if method == "GetJob":
            known.set()

    keys = api_keys(KEYS + "key-ops ops operator\n")
    async with serve(keys=keys, on_call=on_call) as (_, channel):
        for number in range(30):
            for path in (f"/evil/m{number}", f"/{NAME}/m{number}", f"/evil{number}/GetJob"):
                assert await status(channel.unary_unary(path)(b"", metadata=metadata)) in (
                    "UNAUTHENTICATED",
                    "PERMISSION_DENIED",
                    "UNIMPLEMENTED",
                )
        await status(gateway_pb2_grpc.GatewayStub(channel).GetJob(gateway_pb2.GetJobRequest(), metadata=metadata))
        # A client knows of the end of its call a moment before that is told.
        await asyncio.wait_for(known.wait(), 20)
        assert told <= {"other", "GetJob"}


async def test_more_calls_than_the_limit_are_busy_and_probes_go_on(serve, servicer):
    async with serve(max_calls=3) as (server, channel):
        await server.set_ready(True)
        calls = [await started(channel) for _ in range(3)]
        error = await refused(channel)
        assert isinstance(error, BusyError)
        assert error.retry_after_s > 0
        assert await asyncio.to_thread(is_ready, server.address, NAME)
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=NAME))
        assert (await check).status == health_pb2.HealthCheckResponse.SERVING
        # Places come back, however a call ends.
        calls[0].cancel()
        await until_open(channel)
        servicer.release.set()


async def until_open(channel: grpc.aio.Channel) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await started(channel)
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)


async def test_one_tenant_does_not_take_all_places(serve, servicer):
    async with serve(max_calls=4, keys=api_keys(KEYS)) as (_, channel):
        for metadata in (ALICE, ALICE):
            await started(channel, metadata)
        assert isinstance(await refused(channel, ALICE), BusyError)
        for metadata in (BOB, CAROL):
            await started(channel, metadata)
        assert isinstance(await refused(channel, BOB), BusyError)
        servicer.release.set()


async def test_calls_without_a_key_take_no_places(serve):
    async with serve(max_calls=2, keys=api_keys(KEYS)) as (_, channel):
        for _ in range(10):
            assert (await refused(channel)).code == "UNAUTHENTICATED"
        await started(channel, ALICE)


@pytest.mark.parametrize("service", ["x" * 2**17, "x" * 2**24])
async def test_a_health_check_is_no_place_for_bytes(serve, service):
    async with serve() as (_, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        for call in (stub.Check, stub.Watch):
            asked = call(health_pb2.HealthCheckRequest(service=service))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (asked if call is stub.Check else asked.read())
            assert isinstance(from_rpc_error(caught.value), InvalidRequestError)


class Received(Counter[str]):
    """How many calls gRPC receives a request for: now, and at most."""

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Received:
        usual = interceptors._read

        async def read(context: Any, *, timeout_s: float) -> bytes:
            self["now"] += 1
            self["most"] = max(self["most"], self["now"])
            try:
                return await usual(context, timeout_s=timeout_s)
            finally:
                self["now"] -= 1

        monkeypatch.setattr(interceptors, "_read", read)
        return self


@pytest.mark.parametrize(
    ("path", "metadata", "most"),
    [("/grpc.health.v1.Health/Check", (), 4), (f"/{NAME}/GetJob", ALICE, 16)],
    ids=["health", "a tenant"],
)
async def test_only_so_many_requests_are_received_at_once(serve, monkeypatch, path, metadata, most):
    received = Received().watch(monkeypatch)
    async with serve(keys=api_keys(KEYS)) as (_, channel):
        # Streams to a method that wants one request, which these do not send.
        slow = [channel.stream_stream(path)(metadata=metadata) for _ in range(40)]
        async with asyncio.timeout(10):
            while received["now"] < most:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        assert received["most"] == most
        other = gateway_pb2_grpc.GatewayStub(channel).GetJob(gateway_pb2.GetJobRequest(request_id="x"), metadata=BOB)
        assert (await other).request_id == "x"
        for one in slow:
            one.cancel()
        async with asyncio.timeout(10):
            while received["now"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert (await health).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_request_that_never_arrives_gives_its_place_up(serve, monkeypatch):
    monkeypatch.setattr(interceptors, "_READ_S", 0.2)
    async with serve(max_calls=1) as (_, channel):
        call = channel.stream_stream(f"/{NAME}/GetJob")()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(from_rpc_error(caught.value), DeadlineError)
        await until_open(channel)


async def test_a_call_without_a_request_is_the_callers_mistake(serve):
    async with serve() as (_, channel):
        call = channel.stream_unary(f"/{NAME}/GetJob")(iter(()))
        assert await status(call) == "INVALID_ARGUMENT"


async def test_refusals_are_told_and_nobody_fills_the_log_with_them(serve, caplog):
    async with serve(keys=api_keys(KEYS), max_calls=2) as (_, channel):
        stub = gateway_pb2_grpc.GatewayStub(channel)
        for number in range(50):
            await status(stub.GetJob(gateway_pb2.GetJobRequest(), metadata=key_metadata(f"wrong-{number}")))
            await status(channel.unary_unary(f"/evil/m{number}")(b""))
        assert await status(stub.Status(types_pb2.StatusRequest(), metadata=ALICE)) == "PERMISSION_DENIED"
        call = await started(channel, BOB)
        assert isinstance(await refused(channel, BOB), BusyError)
        call.cancel()
    # The server has stopped, so all calls have been told of.
    lines = [vars(record)["streamflow_fields"] for record in caplog.records if record.message == "refused"]
    about = [(line["code"], line["method"], line["tenant"]) for line in lines]
    assert 2 <= sum(code == "UNAUTHENTICATED" for code, _, _ in about) <= 20
    assert ("UNAUTHENTICATED", "GetJob", "") in about
    assert ("PERMISSION_DENIED", "Status", "alice") in about
    [busy] = [line for line in lines if line["code"] == "RESOURCE_EXHAUSTED"]
    assert (busy["method"], busy["tenant"]) == ("Generate", "bob")
    assert "too many calls" in str(busy["reason"])
    for secret in ("wrong-", "key-alice", "/evil"):
        assert secret not in str(lines)
