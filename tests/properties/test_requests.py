"""Any request is taken, and then runs, or is refused in words that help; never anything else."""

from __future__ import annotations

import asyncio
import math
import re
import tracemalloc
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from gateway import admission
from streamflow.client.request import GenerateOptions
from streamflow.config import GatewaySettings
from streamflow.errors import GenerationError, InvalidRequestError, shorten
from streamflow.flow.programs import Role
from streamflow.host.request import read_request
from streamflow.transport.base import Limits
from streamflow.transport.memory import MemoryTransport
from streamflow.types import ModelCard
from streamflow.v1 import gateway_pb2, types_pb2
from tests.cards import CARD as GATEWAY_CARD
from tests.gateway.conftest import Deployment, Gateway
from tests.properties.strategies import (
    BIG,
    CARDS,
    big_request,
    bounded,
    check_refusal,
    field_bytes,
    mutated,
    request_bytes,
    requests,
    wire,
)

SETTINGS = GatewaySettings(max_image_bytes=2**16)

# Of the message, and of the SDK where it has a word of its own.
_FIELDS = types_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
NAMES = {*_FIELDS, *GenerateOptions.__annotations__}
NAMES |= {
    f"{name}.{inner}"
    for name in ("output", "guidance", "control")
    for inner in _FIELDS[name].message_type.fields_by_name
}


def take(request: types_pb2.GenerateRequest, card: ModelCard = CARDS[0]) -> types_pb2.GenerateRequest:
    return admission.fill_in(request, card=card, settings=SETTINGS, request_id="made-here", seed=77)


def said(request: types_pb2.GenerateRequest, field: str) -> object:
    """What the request says in a field of one value; None for the others, and where it says nothing."""
    message: types_pb2.GenerateRequest = request
    *outer, name = field.split(".")
    for part in outer:
        message = getattr(message, part)
    descriptor = message.DESCRIPTOR.fields_by_name.get(name)
    if descriptor is None or descriptor.message_type or descriptor.is_repeated:
        return None
    value = getattr(message, name)
    # A blank text counts as none.
    is_set = (
        message.HasField(name)
        if descriptor.has_presence
        else bool(value.strip() if descriptor.type == descriptor.TYPE_STRING else value)
    )
    return value if is_set else None


def words_for(value: object, field: str) -> set[str]:
    """How a refusal may call a value."""
    if isinstance(value, str):
        return {shorten(value), shorten(value.strip())}
    if field == "output.decoder" and value in types_pb2.DecoderKind.values():
        return {repr(types_pb2.DecoderKind.Name(cast("types_pb2.DecoderKind", value)).rpartition("_")[2].lower())}
    return {shorten(value)}


def assert_helpful(refusal: InvalidRequestError, request: types_pb2.GenerateRequest) -> None:
    """It names the field, the value given and what is allowed, in few words that a log can hold."""
    check_refusal(refusal, "")
    assert not any(unicodedata.category(c) == "Cc" for c in str(refusal))
    field = re.sub(r"\[\d+\]$", "", refusal.field)
    assert field in NAMES
    value = said(request, field)
    if isinstance(value, float) and math.isfinite(value):
        # The places that a float32 does not have may be left out; what is more than nothing is not nothing.
        assert float(refusal.given) == pytest.approx(value, rel=0, abs=1e-6)
        assert bool(float(refusal.given)) == bool(value)
    # Bytes are counted, and images are told together with what multiplies them.
    elif value is not None and not isinstance(value, bytes) and field != "num_images":
        assert refusal.given in words_for(value, field), f"{refusal}; given {value!r}"


def assert_runs(request: types_pb2.GenerateRequest, filled: types_pb2.GenerateRequest, card: ModelCard) -> None:
    """Every stage can read it, and its sampler compiles to numbers."""
    count = admission.num_images(filled)
    assert 1 <= count <= SETTINGS.max_images
    assert admission.reserved_bytes(filled) <= SETTINGS.max_reserved_bytes
    assert admission.priority(filled) in (-1, 0, 1)
    assert 0 < admission.work(request, card) < math.inf
    for message in (filled, filled.guidance):
        assert all(math.isfinite(value) for _, value in message.ListFields() if isinstance(value, float))
    spec = types_pb2.JobSpec(
        request=filled, model_revision=card.revision, init_image_blob="0" * 64 if request.init_image else ""
    )
    data = spec.SerializeToString()
    assert len(data) <= admission.reserved_bytes(filled)
    for index in {0, count - 1}:
        image = read_request(data, index, card)
        assert len(image.program) >= 1
        assert np.isfinite(image.program.coefficients).all()
        assert image.texts.keys() == image.program.roles
        # Something to see, not only what joins, turns or hides.
        assert any(unicodedata.category(c)[0] in "LNPS" for c in image.texts[Role.TARGET])
        assert image.seed == (filled.seed + index) % 2**64
    with pytest.raises(GenerationError):
        read_request(data, count, card)


@bounded(1200)
@given(requests(), st.sampled_from(CARDS))
@example(types_pb2.GenerateRequest(prompts=["\u200b\u202e"]), CARDS[0])
@example(types_pb2.GenerateRequest(prompts=["x"], steps=3, sampler="E4[shift\n=1]"), CARDS[0])
@example(types_pb2.GenerateRequest(prompts=["x"], init_image=b"x", strength=1e-7), CARDS[0])
def test_a_request_runs_or_is_refused_helpfully(request, card):
    try:
        filled = take(request, card)
    except InvalidRequestError as refusal:
        assert_helpful(refusal, request)
    else:
        assert_runs(request, filled, card)
        assert admission.digest(request) == admission.digest(
            types_pb2.GenerateRequest.FromString(request.SerializeToString())
        )


def test_the_requests_above_are_of_both_kinds():
    seen: Counter[str] = Counter()

    @bounded(200)
    @given(requests(), st.sampled_from(CARDS))
    def look(request, card):
        try:
            take(request, card)
            seen["taken"] += 1
        except InvalidRequestError as refusal:
            seen[re.sub(r"\[\d+\]$", "", refusal.field)] += 1

    look()
    assert seen["taken"] > 20
    assert len(seen) > 15


@bounded(150)
@given(requests())
def test_what_was_filled_in_is_taken_again_as_it_is(request):
    request.ClearField("init_image")
    try:
        filled = take(request)
    except InvalidRequestError:
        return
    assert take(filled) == filled


@pytest.mark.parametrize("kind", BIG)
def test_what_is_written_down_of_a_large_request_is_small(kind):
    """Redis keeps the specification: it must fit into what was reserved for the job's results."""

    @bounded(5)
    @given(st.integers(0, 2_000_000))
    def check(size):
        request = big_request(kind, size)
        try:
            filled = take(request)
        except InvalidRequestError as refusal:
            assert_helpful(refusal, request)
        else:
            assert types_pb2.JobSpec(request=filled).ByteSize() <= admission.reserved_bytes(filled)

    check()


@pytest.mark.parametrize("kind", BIG)
def test_a_large_request_is_judged_without_copies_of_it(kind):
    """On the gateway's event loop, so that whoever else calls would wait."""
    request = big_request(kind, 500_000)
    message_bytes = request.ByteSize()
    tracemalloc.start()
    try:
        take(request)
    except InvalidRequestError:
        pass
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # A string that is looked at becomes one of Python's, and is put into the filled-in request.
    assert peak_bytes < 3.5 * message_bytes + 100_000


# -- over gRPC -------------------------------------------------------------------------------------------------------

METHODS = [method.name for method in gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].methods]
INPUTS = {method.name: method.input_type for method in gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].methods}
STREAMS = ("Generate", "Watch")
SUBMITS = ("Generate", "GenerateImages", "Submit")
HEALTH = "/grpc.health.v1.Health/Check"

Code = grpc.StatusCode
KNOWS_IDS = {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND}


@asynccontextmanager
async def gateway() -> AsyncIterator[Gateway]:
    """A real gateway on loopback; its worker makes plain pictures."""
    async with AsyncExitStack() as transports, asyncio.TaskGroup() as tasks, AsyncExitStack() as servers:
        transport = MemoryTransport(limits=Limits(max_jobs=100_000))
        transports.push_async_callback(transport.close)
        deployment = Deployment(transport, servers, tasks)
        deployment.start_worker()
        yield await deployment.gateway(watch_lease_s=0.5)
        deployment.stop()


async def status_of(channel: grpc.aio.Channel, path: str, data: bytes) -> Code:
    try:
        if path.rpartition("/")[2] in STREAMS:
            call = channel.unary_stream(path)(data, timeout=20)
            await call.read()
            call.cancel()
        else:
            await channel.unary_unary(path)(data, timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return Code.OK


def expected(method: str, data: bytes) -> set[Code]:
    """What a call may end with; whose mistake it is follows from its bytes."""
    kind = getattr(types_pb2, INPUTS[method].name, None) or getattr(gateway_pb2, INPUTS[method].name)
    try:
        message = kind.FromString(data)
    except DecodeError:
        return {Code.INVALID_ARGUMENT}
    if method not in SUBMITS:
        return KNOWS_IDS if message.DESCRIPTOR.fields else {Code.OK}
    try:
        admission.check(message, card=GATEWAY_CARD, settings=GatewaySettings())
    except InvalidRequestError:
        return {Code.INVALID_ARGUMENT}
    if message.init_image:
        return {Code.INVALID_ARGUMENT}  # none of those here is a picture
    # An id that a request before had; more images than can be made in time, or than go into one message.
    accepted = {Code.OK, Code.ALREADY_EXISTS, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED}
    return accepted | {Code.INVALID_ARGUMENT} if method == "GenerateImages" else accepted


NAMED = st.builds(lambda text: field_bytes(1, text.encode()), st.text(max_size=70))
ANY_BYTES = st.one_of(request_bytes(), NAMED, NAMED.flatmap(mutated), st.lists(wire(), max_size=2).map(b"".join))


async def test_bytes_over_grpc_are_answered_or_refused_and_the_gateway_goes_on():
    loop = asyncio.get_running_loop()
    seen: Counter[tuple[str, Code]] = Counter()
    good = types_pb2.GenerateRequest(prompts=["a red circle"], width=8, height=8, steps=1).SerializeToString()

    async with gateway() as serving:

        def ask(path: str, data: bytes) -> Code:
            return asyncio.run_coroutine_threadsafe(status_of(serving.channel, path, data), loop).result(30)

        @bounded(180)
        @given(st.sampled_from(METHODS), ANY_BYTES)
        def send(method: str, data: bytes) -> None:
            code = ask(f"/streamflow.v1.Gateway/{method}", data)
            seen[method, code] += 1
            assert code in expected(method, data)

        @bounded(40)
        @given(ANY_BYTES)
        def send_health(data: bytes) -> None:
            assert ask(HEALTH, data) in KNOWS_IDS

        # The examples come from a thread of their own; the gateway and its client stay in this loop.
        await asyncio.to_thread(send)
        await asyncio.to_thread(send_health)
        assert await status_of(serving.channel, "/streamflow.v1.Gateway/GenerateImages", good) is Code.OK
    assert any(seen[method, Code.OK] for method in SUBMITS), "nothing was ever accepted"
    for method in SUBMITS:
        assert seen[method, Code.INVALID_ARGUMENT]
