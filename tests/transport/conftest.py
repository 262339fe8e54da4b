"""Real Redis servers, old and new, and deployments of their own for every test."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from streamflow.transport.base import Transport
from streamflow.transport.embedded import EmbeddedRedis
from tests.transport.worlds import World, redis_binary

_deployments = itertools.count(1)


@pytest.fixture(scope="session")
def redis_62() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(binary=redis_binary("6.2")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_7() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(binary=redis_binary("7")) as server:
        yield server


@pytest.fixture
def deployment() -> str:
    """A name that no other test uses, so that tests share a server and see nothing of each other."""
    return f"test-{next(_deployments)}"


@pytest.fixture(params=["memory", "redis_62", "redis_7"])
async def world(request: pytest.FixtureRequest, deployment: str) -> AsyncIterator[World]:
    server = None if request.param == "memory" else request.getfixturevalue(request.param)
    world = World(deployment, server)
    yield world
    await world.close()


@pytest.fixture(params=["redis_62", "redis_7"])
async def redis_world(request: pytest.FixtureRequest, deployment: str) -> AsyncIterator[World]:
    """Where the test is about Redis itself."""
    world = World(deployment, request.getfixturevalue(request.param))
    yield world
    await world.close()


@pytest.fixture
def transport(world: World) -> Transport:
    return world.open()


@pytest.fixture
def eventually() -> Callable[..., Awaitable[Any]]:
    """Waits until an async condition gives something true, and returns it."""

    async def wait(condition: Callable[[], Awaitable[Any]], *, timeout_s: float = 15.0) -> Any:
        async with asyncio.timeout(timeout_s):
            while True:
                found = await condition()
                if found:
                    return found
                await asyncio.sleep(0.01)

    return wait
