"""What happens between the processes: replies lost, connections slow, broken or dead, Redis emptied under them all."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis.asyncio as redis

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.errors import DeadlineError, NotFoundError, StreamFlowError, UnavailableError
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.types import JobState, Stage
from tests.faults.harness import (
    Asked,
    Tally,
    ask,
    assert_under_way,
    check,
    everything,
    light_deployment,
    read_again,
    requests,
    settled,
)
from tests.faults.proxy import Loss, Proxy

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

IMPATIENT_S = 6.0
"""The deadline of requests that meet a dead connection."""
SLACK_S = 2.0
"""How much later than its deadline a request may end, on a busy machine."""


@dataclass(frozen=True)
class Place:
    """A deployment, and the proxy on one of its connections."""

    deployment: LocalDeployment
    proxy: Proxy
    behind_gateway: bool

    def client(self, *, timeout_s: float = 60.0) -> AsyncClient:
        """One whose requests pass the proxy, be it before or behind the gateway."""
        address = self.deployment.address if self.behind_gateway else self.proxy.address
        return AsyncClient(address, timeout_s=timeout_s)


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
everywhere = pytest.mark.parametrize("where", [before_the_gateway, before_redis])


async def in_time(client: AsyncClient, asked: Asked) -> StreamFlowError | None:
    """Asks; the pictures, or an error that says what is wrong, must come by the deadline."""
    began_s = time.monotonic()
    async with asyncio.timeout(60):
        answer = await ask(client, asked)
    took_s = time.monotonic() - began_s
    assert took_s < client.timeout_s + SLACK_S, (asked, took_s, answer)
    if isinstance(answer, list):
        assert answer == asked.files
        return None
    assert isinstance(answer, DeadlineError | UnavailableError), answer
    assert client.address in str(answer) or "not finished within" in str(answer), answer
    return answer


async def check_ended(place: Place, client: AsyncClient, sent: Sequence[Asked], tally: Tally) -> None:
    """Whatever their clients were told, the jobs end: with their pictures, or because nobody waits for them."""
    tally.requests += len(sent)
    for asked in sent:
        # It may never have been admitted.
        with suppress(NotFoundError):
            while not (job := await client.job(asked.request_id)).state.terminal:  # noqa: ASYNC110 - remote
                await asyncio.sleep(0.1)
            if job.state is JobState.IMAGES:
                assert await read_again(client, asked.request_id) == asked.files
            else:
                assert job.state in (JobState.DEADLINE, JobState.CANCELLED), (asked, job)
    await settled(place.deployment)


def script_digest(name: str) -> bytes:
    """By which a script is called."""
    folder = files("streamflow.transport.scripts")
    source = (folder / "common.lua").read_text() + (folder / f"{name}.lua").read_text()
    return hashlib.sha1(source.encode()).hexdigest().encode()


# Six times: the transport gives up after four, and the SDK sends again.
@pytest.mark.parametrize(("times", "loss"), [(1, Loss.RESET), (6, Loss.RESET), (1, Loss.SILENCE)])
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


@everywhere
async def test_11_latency(where: Where, tally: Tally, tmp_path: Path) -> None:
    sent = requests(12, "latency", steps=20)
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


@everywhere
async def test_11_half_open(where: Where, tally: Tally, tmp_path: Path) -> None:
    names = ("impatient", "patient", "later")
    impatient, patient, later = (requests(8, name, steps=60) for name in names)
    async with (
        where(tmp_path) as place,
        place.client() as client,
        place.client(timeout_s=IMPATIENT_S) as impatient_client,
    ):
        waiting = asyncio.create_task(everything(client, patient))
        work = [asyncio.create_task(in_time(impatient_client, asked)) for asked in impatient]
        await asyncio.sleep(0.5)
        place.proxy.go_silent()
        assert any(await asyncio.gather(*work)), "the silence came too late"
        place.proxy.speak()
        # Nobody is told that the connections of before are dead.
        began_s = time.monotonic()
        await everything(client, later)
        tally.recovery_s = time.monotonic() - began_s
        await waiting
        await check(place.deployment, client, [*patient, *later], tally)
        await check_ended(place, client, impatient, tally)


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
