"""What a gateway tells of deployments that it sees, and of those that it does not."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import pytest
from prometheus_client import CollectorRegistry

from gateway.models import Models, Served
from gateway.watching import SEEN_S, GatewayWatch
from streamflow.config import GatewaySettings
from streamflow.telemetry import Counters
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Stage, WorkerInfo
from tests.cards import CARD

pytestmark = pytest.mark.timeout(60)

OF_DEPLOYMENTS = {"queue_images", "backlog_seconds", "dead_letters", "jobs_admitted_total", "replicas"}


class Watching:
    """A gateway's watch over deployments in a Redis, and a clock that stands still."""

    def __init__(self, url: str, *names: str) -> None:
        self.now_s, self.metrics, counters = 1000.0, CollectorRegistry(), Counters()
        self.transports = [RedisTransport.from_url(url, deployment=secrets.token_hex(8)) for _ in names]
        self.models = Models(
            [
                Served.over(transport, card=replace(CARD, name=name), settings=GatewaySettings(), counters=counters)
                for name, transport in zip(names, self.transports, strict=True)
            ]
        )
        self.watch = GatewayWatch(self.metrics, counts=counters.snapshot, clock=lambda: self.now_s)

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.watch.keep_looking(self.models, every_s=0.02))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            await self.models.close()

    def told(self, name: str, **labels: str) -> float | None:
        return self.metrics.get_sample_value(f"streamflow_{name}", labels)

    def families(self) -> set[str]:
        """Those with a value."""
        samples = (sample for family in self.metrics.collect() for sample in family.samples)
        return {sample.name.removeprefix("streamflow_") for sample in samples}

    async def seen(self, name: str, value: float, **labels: str) -> None:
        async with asyncio.timeout(30):
            while self.told(name, **labels) != value:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_what_is_not_seen_any_more_is_not_told() -> None:
    with EmbeddedRedis() as redis:
        watching = Watching(redis.url, "shapes")
        async with watching.looking():
            await watching.seen("backlog_seconds", 0.0, model="shapes", stage="decode")
            assert watching.told("deployment_seen_seconds", model="shapes") == 0
            redis.stop()
            watching.now_s += SEEN_S
            assert watching.told("replicas", model="shapes", stage="decode") == 0
            watching.now_s += 1
            # Absent, so that neither alerts nor autoscalers take it for what is.
            assert not watching.families() & OF_DEPLOYMENTS
            assert watching.told("deployment_seen_seconds", model="shapes") == SEEN_S + 1
            redis.start()
            await watching.seen("deployment_seen_seconds", 0.0, model="shapes")
            assert watching.families() >= OF_DEPLOYMENTS - {"queue_images"}


async def test_a_deployment_that_was_never_seen_is_told_as_that(unused_tcp_port: int) -> None:
    watching = Watching(f"redis://127.0.0.1:{unused_tcp_port}/0", "shapes", "rings")
    async with watching.looking():
        await watching.seen("deployment_seen_seconds", 0.0, model="rings")
        watching.now_s += 60
        assert watching.told("deployment_seen_seconds", model="shapes") == 60
        assert watching.told("replicas", model="shapes", stage="decode") is None


async def test_replicas_are_those_that_take_new_work(redis_url: str) -> None:
    watching = Watching(redis_url, "shapes")
    numbers = count(1)

    async def register(revision: str, *, draining: bool = False) -> None:
        name = f"decoder-{next(numbers)}"
        info = WorkerInfo(name, Stage.DECODE, "127.0.0.1:9", "shapes", revision, "torch", "cpu", 8, draining=draining)
        await watching.transports[0].register(info, lease_s=60)

    await register(CARD.revision)
    await register(CARD.revision)
    await register(CARD.revision, draining=True)
    await register("of-other-weights")
    async with watching.looking():
        await watching.seen("replicas", 2, model="shapes", stage="decode")
        assert watching.told("other_replicas", model="shapes", stage="decode") == 2
        assert watching.told("deployment_slots", model="shapes", stage="decode") == 16
        assert watching.told("replicas", model="shapes", stage="denoise") == 0
