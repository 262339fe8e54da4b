"""What happens between the processes: replies lost, connections slow, broken or dead, Redis emptied under them all."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis.asyncio as redis

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.types import Stage
from tests.faults.harness import (
    Tally,
    assert_under_way,
    check,
    everything,
    light_deployment,
    requests,
    settled,
)
from tests.faults.proxy import Loss, Proxy
from tests.faults.silence import meet_silence

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


def full(*values: object) -> Any:
    """Parameters that only the full matrix has."""
    return pytest.param(*values, marks=pytest.mark.full)


@dataclass(frozen=True)
class Place:
    """A deployment, and the proxy on one of its connections."""

    deployment: LocalDeployment
    proxy: Proxy
    behind_gateway: bool

    @property
    def address(self) -> str:
        """Of the gateway, for clients whose requests pass the proxy, be it before or behind the gateway."""
        return self.deployment.address if self.behind_gateway else self.proxy.address

    def client(self) -> AsyncClient:
        return AsyncClient(self.address, timeout_s=60.0)


@asynccontextmanager
async def before_the_gateway(folder: Path) -> AsyncIterator[Place]:
    async with light_deployment(slots=8, data_dir=folder) as deployment, Proxy(deployment.address) as proxy:
        yield Place(deployment, proxy, behind_gateway=False)


@asynccontextmanager
async def before_redis(folder: Path) -> AsyncIterator[Place]:
    with EmbeddedRedis(directory=folder) as server:
        user, _, address = urlsplit(server.url).netloc.rpartition("@")
        async with (
            Proxy(address) as proxy,
            light_deployment(slots=8, redis_url=f"redis://{user}@{proxy.address}/0") as deployment,
        ):
            yield Place(deployment, proxy, behind_gateway=True)


Where = Callable[[Path], AbstractAsyncContextManager[Place]]
everywhere = pytest.mark.parametrize("where", [full(before_the_gateway), before_redis])


def script_digest(name: str) -> bytes:
    """By which a script is called."""
    folder = files("streamflow.transport.scripts")
    source = (folder / "common.lua").read_text() + (folder / f"{name}.lua").read_text()
    return hashlib.sha1(source.encode()).hexdigest().encode()


# Six times: the transport gives up after four, and the SDK sends again.
@pytest.mark.parametrize(("times", "loss"), [(1, Loss.RESET), full(6, Loss.RESET), full(1, Loss.SILENCE)])
async def test_10_the_reply_to_admit_is_lost(times: int, loss: Loss, tally: Tally, tmp_path: Path) -> None:
    first, *sent = requests(5, "admit")
    async with before_redis(tmp_path) as place, place.client() as client:
        # So that the script is known to Redis, and what is lost is the reply of one that ran.
        await everything(client, [first])
        lost = times * len(sent)
        place.proxy.lose_replies(script_digest("admit"), count=lost, loss=loss)
        await everything(client, sent)
        assert place.proxy.lost_replies == lost
        assert {job.request_id for job in await client.jobs()} == {asked.request_id for asked in (first, *sent)}
        await check(place.deployment, client, [first, *sent], tally)


@pytest.mark.full
@everywhere
async def test_11_latency(where: Where, tally: Tally, tmp_path: Path) -> None:
    sent = requests(8, "latency", steps=20)
    async with where(tmp_path) as place, place.client() as client:
        place.proxy.latency_s = 0.2
        await everything(client, sent)
        place.proxy.latency_s = 0.0
        await check(place.deployment, client, sent, tally)


@everywhere
async def test_11_resets(where: Where, tally: Tally, tmp_path: Path) -> None:
    sent, broken = requests(30, "resets", steps=60), 0
    async with where(tmp_path) as place, place.client() as client:
        work = asyncio.create_task(everything(client, sent))
        for _ in range(6):
            await asyncio.wait({work}, timeout=0.4)
            broken += place.proxy.reset()
        assert_under_way(work)
        assert broken >= 4
        await work
        await check(place.deployment, client, sent, tally)


@pytest.mark.full
@everywhere
async def test_11_half_open(where: Where, tally: Tally, tmp_path: Path) -> None:
    async with where(tmp_path) as place:
        proxy = place.proxy
        await meet_silence(place.deployment, place.address, tally, begin=proxy.go_silent, end=proxy.speak)


@pytest.mark.full
@pytest.mark.skipif(
    subprocess.run(["sh", "-c", "unshare -rn true"], capture_output=True).returncode != 0,
    reason="needs a network of its own, and `unshare -rn` may not make one here",
)
async def test_11_the_link_is_down(tally: Tally) -> None:
    """Every connection of a machine at once; the machine is a network namespace."""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "-rn", sys.executable, "-m", "tests.faults.link_down"), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    found = json.loads(output)
    tally.requests, tally.recovery_s = found["requests"], found["recovery_s"]


@pytest.mark.full
async def test_19_redis_emptied(tally: Tally) -> None:
    sent = requests(40, "flushed", steps=60)
    async with (
        light_deployment(denoisers=2, slots=8) as deployment,
        AsyncClient(deployment.address) as client,
        redis.from_url(deployment.redis_url) as store,
    ):
        work = asyncio.create_task(everything(client, sent))
        for _ in range(2):
            await asyncio.sleep(0.7)
            await store.flushall()
            await store.script_flush()
        assert_under_way(work)
        await work
        tally.requests += len(sent)
        await settled(deployment)


@pytest.mark.full
async def test_19_groups_destroyed(tally: Tally) -> None:
    sent, destroyed = requests(40, "groups", steps=60), 0
    async with (
        light_deployment(denoisers=2, slots=8) as deployment,
        AsyncClient(deployment.address) as client,
        redis.from_url(deployment.redis_url) as store,
    ):
        work = asyncio.create_task(everything(client, sent))
        for _ in range(3):
            await asyncio.sleep(0.5)
            destroyed += await destroy_groups(store)
        assert_under_way(work)
        assert destroyed > len(Stage)
        await work
        await check(deployment, client, sent, tally)


async def destroy_groups(store: redis.Redis) -> int:
    count = 0
    for stage in Stage:
        async for key in store.scan_iter(match=f"sf:v1:*:{stage.value}:*", _type="stream"):
            count += await store.xgroup_destroy(key, "workers")
    return count
