"""Whatever bytes arrive, a call ends with a status that says whose mistake it was: never UNKNOWN, never INTERNAL."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow.v1 import gateway_pb2, types_pb2

pytestmark = pytest.mark.timeout(120)

METHODS = [method.name for method in gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].methods]
STREAMS = ("Generate", "Watch")
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


def a_request(**fields: object) -> bytes:
    return types_pb2.GenerateRequest(**fields).SerializeToString()


BYTES = st.one_of(
    st.binary(max_size=60),
    st.builds(
        a_request,
        request_id=st.text(max_size=5),
        prompts=st.lists(st.text(max_size=20), max_size=3),
        steps=st.integers(0, 2**32 - 1),
        num_images=st.integers(0, 2**32 - 1),
        guidance_scale=st.floats(width=32),
        seed=st.integers(0, 2**64 - 1),
        width=st.sampled_from([0, 8, 64, 65, 2**31]),
        init_image=st.binary(max_size=30),
    ),
)


async def status_of(channel: grpc.aio.Channel, method: str, data: bytes) -> grpc.StatusCode:
    path = f"/streamflow.v1.Gateway/{method}"
    try:
        if method in STREAMS:
            call = channel.unary_stream(path)(data, timeout=10)
            await call.read()
            call.cancel()
        else:
            timeout_s = 0.2 if method == "GenerateImages" else 10
            await channel.unary_unary(path)(data, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("make_transport", ["memory"], indirect=True)
async def test_no_bytes_make_the_gateway_stumble(deploy):
    gateway = await deploy(max_jobs=3).gateway(watch_lease_s=0.2)
    loop = asyncio.get_running_loop()
    seen: set[grpc.StatusCode] = set()

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.sampled_from(METHODS), BYTES)
    def send(method: str, data: bytes) -> None:
        asked = asyncio.run_coroutine_threadsafe(status_of(gateway.channel, method, data), loop)
        code = asked.result(timeout=30)
        assert code in ALLOWED
        seen.add(code)

    # The examples come from a thread of their own; the gateway and its client stay in this loop.
    await asyncio.to_thread(send)
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= seen


@pytest.mark.parametrize("make_transport", ["memory"], indirect=True)
@pytest.mark.parametrize("size_bytes", [5 * 2**20, 40 * 2**20])
async def test_large_messages(deploy, size_bytes):
    gateway = await deploy().gateway()
    code = await status_of(gateway.channel, "Submit", a_request(prompts=["x" * size_bytes]))
    assert code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("make_transport", ["memory"], indirect=True)
async def test_deep_nesting(deploy):
    gateway = await deploy().gateway()
    # An unknown field of groups within groups.
    code = await status_of(gateway.channel, "Submit", b"\xa3\x06" * 100_000)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
