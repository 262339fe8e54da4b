"""Requests without the SDK's patience: what the server loses or refuses is not sent again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.client.request import build_request
from streamflow.errors import NotFoundError
from streamflow.rpc.errors import PUSHBACK_KEY
from streamflow.types import JobState
from streamflow.v1 import gateway_pb2_grpc
from tests.faults.harness import Asked


class Submitted:
    """Requests that go on without their client. Nobody sends them again, so what the server loses stays lost."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.answered: list[Asked] = []
        self._changed = asyncio.Event()

    async def submit(self, sent: Sequence[Asked], *, at_once: int = 8) -> None:
        places = asyncio.Semaphore(at_once)
        await asyncio.gather(*(self._submit(asked, places) for asked in sent))

    async def reach(self, count: int) -> None:
        """Returns when so many were answered."""
        while len(self.answered) < count:
            self._changed.clear()
            await self._changed.wait()

    async def lost(self) -> list[str]:
        """Those of which the server knows nothing, though it had answered."""
        answered = list(self.answered)
        states = await asyncio.gather(*(self._state(asked) for asked in answered))
        return [asked.request_id for asked, state in zip(answered, states, strict=True) if state is None]

    async def ended(self) -> None:
        """Returns when no job is under way."""
        for asked in self.answered:
            while (state := await self._state(asked)) is not None and not state.terminal:  # noqa: ASYNC110 - remote
                await asyncio.sleep(0.1)

    async def _submit(self, asked: Asked, places: asyncio.Semaphore) -> None:
        async with places:
            await self._client.submit(asked.prompt, **asked.options)
        self.answered.append(asked)
        self._changed.set()

    async def _state(self, asked: Asked) -> JobState | None:
        try:
            return (await self._client.job(asked.request_id)).state
        except NotFoundError:
            return None


async def refusal(deployment: LocalDeployment, asked: Asked, *, timeout_s: float = 15.0) -> grpc.aio.AioRpcError | None:
    """What the gateway answers to a client that does not try again; None where it takes the request."""
    async with grpc.aio.insecure_channel(deployment.address, options=[("grpc.enable_retries", 0)]) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        try:
            await stub.Submit(build_request(asked.prompt, detach=True, **asked.options), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return error
    return None


async def assert_busy(deployment: LocalDeployment, asked: Asked, *, timeout_s: float = 15.0) -> None:
    """It is refused for load, and told when to come again: by the server, not by what the SDK takes without it."""
    error = await refusal(deployment, asked, timeout_s=timeout_s)
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
    assert int(dict(error.trailing_metadata() or ())[PUSHBACK_KEY]) >= 1000
