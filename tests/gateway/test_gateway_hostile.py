"""Whatever bytes arrive, a call ends with a status that says whose mistake it was: never UNKNOWN, never INTERNAL."""

from __future__ import annotations

import asyncio
import io
import os

import grpc
import grpc.aio
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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


@pytest.mark.parametrize("make_transport", ["memory"], indirect=True)
@pytest.mark.parametrize("spare", ["unknown field", "the same field again"])
async def test_bytes_that_belong_to_no_field_are_refused_where_they_are_many(deploy, spare):
    gateway = await deploy().gateway()
    known = a_request(prompts=["a red circle"])

    def with_spare(size_bytes: int) -> bytes:
        if spare == "unknown field":
            unused = 10_000
            assert unused not in types_pb2.GenerateRequest.DESCRIPTOR.fields_by_number
            # A message of one field has the same bytes whatever it is called; this one is read as a string.
            key = _varint(unused << 3 | 2)
            return known + key + _varint(size_bytes) + bytes(size_bytes)
        return a_request(request_id="x" * size_bytes) + a_request(request_id="y") + known

    assert await status_of(gateway.channel, "Submit", with_spare(1000)) is grpc.StatusCode.OK
    assert await status_of(gateway.channel, "Submit", with_spare(2**20)) is grpc.StatusCode.INVALID_ARGUMENT


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("make_transport", ["memory"], indirect=True)
async def test_open_calls_do_not_hold_what_they_brought(deploy):
    gateway = await deploy().gateway()
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), np.uint8)).save(picture, "PNG")
    data = a_request(request_id="one", prompts=["a red circle"], init_image=picture.getvalue(), width=64, height=64)
    process = psutil.Process(os.getpid())

    async def opened() -> grpc.aio.UnaryStreamCall:
        call = gateway.channel.unary_stream("/streamflow.v1.Gateway/Generate")(data)
        await call.read()
        return call

    calls = [await opened()]
    before = process.memory_info().rss
    # They attach to the job that the first one began.
    calls += [await opened() for _ in range(48)]
    grown = process.memory_info().rss - before
    for call in calls:
        call.cancel()
    # What was on its way is not all given back to the system.
    assert grown < 48 * len(data) / 2
