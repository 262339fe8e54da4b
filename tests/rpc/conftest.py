"""A small real service on loopback, for the tests of what every service shares."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import grpc.aio
import pytest

from streamflow.config import Settings
from streamflow.rpc.channels import Target, open_aio_channel
from streamflow.rpc.errors import rpc_errors
from streamflow.rpc.server import RpcServer, Service
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2

NAME = "streamflow.v1.Gateway"


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open none, as when it has too many open; it can still look at them."""
    before, first_free = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Answering(gateway_pb2_grpc.GatewayServicer):
    """GetJob raises what it is given, or answers; Watch and Generate do the same as streams of both kinds."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def GetJob(self, request: Any, context: Any) -> Any:
        async with rpc_errors(context):
            if self.error is not None:
                raise self.error
            return gateway_pb2.Job(request_id=request.request_id, state=types_pb2.JOB_STATE_QUEUED)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with rpc_errors(context):
            yield gateway_pb2.GenerateEvent(request_id=request.request_id)
            if self.error is not None:
                raise self.error

    async def Generate(self, request: Any, context: Any) -> None:
        async with rpc_errors(context):
            self.entered.set()
            await context.write(gateway_pb2.GenerateEvent(request_id=request.request_id))
            await self.release.wait()


@pytest.fixture
async def servicer() -> Answering:
    return Answering()


Serve = Callable[..., AbstractAsyncContextManager[tuple[RpcServer, grpc.aio.Channel]]]


@pytest.fixture
def serve(servicer: Answering) -> Serve:
    """`async with serve(reflection=True, keys=...) as (server, channel)`."""

    @asynccontextmanager
    async def start(
        *,
        keys: Any = None,
        credentials: Any = None,
        on_drain: Any = None,
        on_call: Any = None,
        root_ca: bytes | None = None,
        health_port: int = 0,
        **settings: Any,
    ) -> AsyncIterator[tuple[RpcServer, grpc.aio.Channel]]:
        values = {"host": "localhost", "port": 0, "drain_grace_s": 5.0, **settings}
        for_tenants = frozenset({"GetJob", "Watch", "Generate"})
        service = Service(NAME, gateway_pb2_grpc.add_GatewayServicer_to_server, servicer, for_tenants)
        server = RpcServer(
            Settings(**values),
            services=[service],
            keys=keys,
            credentials=credentials,
            on_drain=on_drain,
            on_call=on_call,
            health_port=health_port,
        )
        async with server, open_aio_channel(Target(server.address, root_ca=root_ca)) as channel:
            yield server, channel

    return start
