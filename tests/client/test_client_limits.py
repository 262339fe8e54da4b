"""Large messages: how large they may be, what is said of those that are larger, and that they are sent again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from streamflow import AsyncClient, Client, InvalidRequestError
from streamflow.client import Accepted, Done, ImageReady
from streamflow.config import GatewaySettings
from streamflow.rpc.channels import DEFAULT_MAX_MESSAGE_BYTES
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2
from tests.client.deployment import Deployment

MIB = 2**20
SUBMIT, GENERATE = "submit", "generate"


@dataclass
class Scripted(gateway_pb2_grpc.GatewayServicer):
    """Answers with an image of so many bytes in one part, after so many attempts that it refuses.

    `attempts` has, for each call that arrived, the sends before it that gRPC itself repeated.
    """

    refusals: int = 0
    image_bytes: int = 0
    attempts: list[int] = field(default_factory=list)

    def Submit(self, request: types_pb2.GenerateRequest, context: grpc.ServicerContext) -> gateway_pb2.Job:
        self._arrived(context)
        return gateway_pb2.Job(request_id=request.request_id, state=types_pb2.JOB_STATE_QUEUED)

    def Generate(
        self, request: types_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[gateway_pb2.GenerateEvent]:
        self._arrived(context)
        yield gateway_pb2.GenerateEvent(accepted=gateway_pb2.Accepted(num_images=1))
        data, info = bytes(self.image_bytes), types_pb2.ImageInfo(format=types_pb2.IMAGE_FORMAT_RAW)
        yield gateway_pb2.GenerateEvent(image=gateway_pb2.Image(info=info, total_bytes=len(data), data=data))
        yield gateway_pb2.GenerateEvent(done=gateway_pb2.Done(state=types_pb2.JOB_STATE_IMAGES))

    def _arrived(self, context: grpc.ServicerContext) -> None:
        before: Any = dict(context.invocation_metadata()).get("grpc-previous-rpc-attempts", 0)
        self.attempts.append(int(before))
        if len(self.attempts) <= self.refusals:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


@contextlib.contextmanager
def serving(servicer: Scripted, *, max_message_bytes: int = 64 * MIB) -> Iterator[str]:
    options = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, options=options)
        gateway_pb2_grpc.add_GatewayServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


async def ask(kind: str, address: str, call: str, **settings: Any) -> Any:
    """The answer to a request with 10 MiB of pictures, from either client."""
    picture = bytes(5 * MIB)
    if kind == "blocking":
        with Client(address, timeout_s=30, **settings) as client:
            return getattr(client, call)("a ring", image=picture, mask=picture)
    async with AsyncClient(address, timeout_s=30, **settings) as other:
        return await getattr(other, call)("a ring", image=picture, mask=picture)


both_clients = pytest.mark.parametrize("kind", ["blocking", "asyncio"])


@both_clients
@pytest.mark.parametrize("call", [SUBMIT, GENERATE])
async def test_large_requests_that_meet_an_unavailable_gateway_are_sent_again(kind: str, call: str) -> None:
    servicer = Scripted(refusals=2)
    with serving(servicer) as address:
        await ask(kind, address, call)
    # By the client: the channel below would keep the answers to itself until the deadline.
    assert servicer.attempts == [0, 0, 0]


@both_clients
async def test_the_default_takes_large_messages_either_way(kind: str) -> None:
    servicer = Scripted(image_bytes=40 * MIB)
    with serving(servicer) as address:
        result = await ask(kind, address, GENERATE)
    assert len(result.files[0]) == 40 * MIB
    # What a gateway takes and sends in one message, a client sends and takes.
    assert GatewaySettings().max_message_bytes <= DEFAULT_MAX_MESSAGE_BYTES


@both_clients
@pytest.mark.parametrize(
    ("client_mib", "server_mib", "field", "owner", "remedy"),
    [
        (
            8,
            64,
            "request",
            "this client",
            "send smaller pictures, or create the client with a larger max_message_bytes",
        ),
        (64, 8, "request", "the gateway", "send smaller pictures, or have the gateway started with a larger"),
        (16, 64, "answer", "this client", "create the client with a larger max_message_bytes"),
        (64, 16, "answer", "the gateway", "have the gateway started with a larger --max-message-bytes"),
    ],
)
async def test_what_is_too_large_says_whose_limit_it_met(
    kind: str, client_mib: int, server_mib: int, field: str, owner: str, remedy: str
) -> None:
    servicer = Scripted(image_bytes=20 * MIB)
    with (
        serving(servicer, max_message_bytes=server_mib * MIB) as address,
        pytest.raises(InvalidRequestError) as caught,
    ):
        await ask(kind, address, GENERATE, max_message_bytes=client_mib * MIB)
    error = caught.value
    size_mib = 10 if field == "request" else 20
    assert error.field == field
    assert int(error.given.split()[3]) // MIB == size_mib
    assert error.allowed == f"{min(client_mib, server_mib) * MIB} bytes, the limit of {owner}"
    assert error.hint.startswith(remedy)
    # It would be too large again.
    assert len(servicer.attempts) == (0 if field == "request" else 1)


def test_a_small_limit_still_takes_images_of_any_size() -> None:
    with Deployment() as deployment, Client(deployment.address, timeout_s=30, max_message_bytes=2 * MIB) as client:
        events = list(client.stream("a ring", width=1024, height=1024, format="raw"))
        assert isinstance(events[0], Accepted)
        assert [len(event.data) for event in events if isinstance(event, ImageReady)] == [3 * MIB]
        assert isinstance(events[-1], Done)


@pytest.mark.parametrize("given", [-1, 0, MIB, 2**31])
@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_a_limit_that_cannot_be_used_is_refused(make: Any, given: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"max_message_bytes: got {given}; allowed: 2097152 to 1073741824"):
        make("127.0.0.1:1", max_message_bytes=given)
