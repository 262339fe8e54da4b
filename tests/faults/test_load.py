"""More than can be done, for a moment and for long: what is promised is kept, the rest is refused at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from urllib.parse import urlsplit

import psutil
import pytest
import redis.asyncio as redis

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.errors import BusyError, DeadlineError
from streamflow.transport.redis_client import MAX_CONNECTIONS
from streamflow.types import JobState
from tests.faults.conftest import QUICK, SOAK_S
from tests.faults.harness import (
    Asked,
    Tally,
    ask,
    check,
    descriptors,
    everything,
    light_deployment,
    read_again,
    requests,
    storm_kill,
)
from tests.faults.submitted import assert_busy

pytestmark = pytest.mark.faults

DEADLINE_S = 4.0
STEPS = 40
HASTE_S = 2.0
"""A deadline that an idle deployment keeps and a loaded one cannot."""
JOB_KEEP_S = 120.0
"""In the soak, so that as many jobs go as come."""
MOST_KILLS = 28
"""What dies again and again is started ever later, so more would show the supervisor's patience."""
STORM_S = 0.5
"""Between two kills, besides what it takes to look whom to spare: three deliveries are an image's last."""


@dataclass
class Load:
    """What became of requests that came at a steady rate, whether or not earlier ones had been answered.

    Attributes:
        seconds: the window in which they came.
        in_window: pictures that came in it as well. What comes later took time that no load is charged for.
    """

    offered_per_s: float
    seconds: float
    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    made: list[Asked] = field(default_factory=list)
    late: list[Asked] = field(default_factory=list)
    in_window: int = 0

    @property
    def goodput_per_s(self) -> float:
        return self.in_window / self.seconds

    def __str__(self) -> str:
        p95 = quantiles(self.accepted_s, n=20)[-1] if len(self.accepted_s) > 1 else 0.0
        refused = f"{len(self.refused_s)} refused"
        if self.refused_s:
            refused += f" after {median(self.refused_s) * 1000:.0f} ms (most {max(self.refused_s) * 1000:.0f} ms)"
        return (
            f"offered {self.offered_per_s:.1f}/s: {self.goodput_per_s:.1f}/s in time, p95 {p95:.1f} s, "
            f"{len(self.late)} late, {refused}"
        )


async def offer(client: AsyncClient, per_s: float, seconds: float, name: str) -> Load:
    """An open loop: a request every 1 / per_s seconds, each with the deadline."""
    load = Load(per_s, seconds)
    opened_s = time.monotonic()

    async def one(number: int) -> None:
        asked, began = Asked(f"{name}-{number}", f"{name} {number}", number, STEPS), time.monotonic()
        answer = await ask(client, asked, timeout_s=DEADLINE_S)
        took_s = time.monotonic() - began
        match answer:
            case BusyError():
                load.refused_s.append(took_s)
            case DeadlineError():
                load.late.append(asked)
            case list():
                assert answer == asked.files
                load.made.append(asked)
                load.accepted_s.append(took_s)
                load.in_window += time.monotonic() < opened_s + seconds
            case error:
                raise error

    async with asyncio.TaskGroup() as tasks:
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(opened_s + number / per_s - time.monotonic())
            tasks.create_task(one(number))
    return load


@pytest.mark.timeout(180)
async def test_1_overload(tally: Tally) -> None:
    """Half, nine tenths and twice the capacity of a denoiser with 8 slots, in an open loop."""
    seconds = 5.0
    async with (
        light_deployment(slots=8) as deployment,
        AsyncClient(deployment.address, max_busy_retries=0) as client,
    ):
        began = time.monotonic()
        warm = requests(48, "warm", steps=STEPS, several=1000)
        await everything(client, warm)
        capacity = len(warm) / (time.monotonic() - began)

        async def told_when() -> None:
            # With less time than the queue takes by now: none of these is taken.
            await asyncio.sleep(0.7 * seconds)
            for number in range(5):
                await assert_busy(deployment, Asked(f"hasty-{number}", "hasty", number, STEPS), timeout_s=HASTE_S)

        loads = [await offer(client, factor * capacity, seconds, f"load-{factor:g}") for factor in (0.5, 0.9)]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(told_when())
            loads.append(await offer(client, 2 * capacity, seconds, "load-2"))
        tally.note = "; ".join([f"capacity {capacity:.1f}/s", *map(str, loads)])
        assert loads[2].goodput_per_s >= 0.8 * max(load.goodput_per_s for load in loads[:2]), tally.note
        assert loads[2].refused_s
        for load in loads:
            assert len(load.late) <= 0.05 * (len(load.late) + len(load.made)), str(load)
        late = [asked for load in loads for asked in load.late]
        await check_late(client, late)
        tally.requests += len(late)
        await check(deployment, client, [*warm, *(asked for load in loads for asked in load.made)], tally)


async def check_late(client: AsyncClient, late: list[Asked]) -> None:
    """They were accepted, so they ended: at their deadline, or with pictures that came as their client gave up."""
    for asked in late:
        while not (job := await client.job(asked.request_id)).state.terminal:  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.1)
        if job.state is JobState.IMAGES:
            assert await read_again(client, asked.request_id) == asked.files
        else:
            assert job.state is JobState.DEADLINE, (asked, job)


@pytest.mark.timeout(900)
async def test_2_storm_over_everything(tally: Tally, tmp_path: Path) -> None:
    """Workers of every stage, the gateway and Redis are killed at random under a thousand requests."""
    rng, count = random.Random(2), 240 if QUICK else 1000
    sent = requests(count, "storm", steps=18)
    killed: Counter[str] = Counter()
    async with (
        light_deployment(encoders=2, denoisers=2, decoders=2, slots=16, log_dir=tmp_path) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        done: list[float] = []
        at_once = asyncio.Semaphore(200)

        async def one(asked: Asked) -> None:
            async with at_once:
                assert await ask(client, asked) == asked.files, asked
                done.append(time.monotonic())

        work = asyncio.gather(*(one(asked) for asked in sent))
        names = list(deployment.processes)
        # These two first; afterwards all in random order, and none is spared.
        deck = [*rng.sample(names, len(names)), "gateway", "redis"]
        while not work.done() and killed.total() < MOST_KILLS:
            await asyncio.wait({work}, timeout=STORM_S * rng.uniform(0.5, 1.5))
            deck = deck or rng.sample(names, len(names))
            if not work.done() and (name := await storm_kill(deployment, deck)):
                killed[name.split("-")[0]] += 1
                # By which it is seen whom to spare.
                await deployment.wait_ready("redis")
        await work
        await check(deployment, client, sent, tally)
    pauses = [later - earlier for earlier, later in pairwise(done)]
    tally.recovery_s = max(pauses)
    counts = ", ".join(f"{count} {name}" for name, count in killed.most_common())
    tally.note = f"killed {counts}; longest pauses between images " + ", ".join(
        f"{pause:.2f} s" for pause in nlargest(3, pauses)
    )
    assert killed.keys() >= {"redis", "gateway"}, killed
    assert len(killed) >= (3 if QUICK else 5), killed


@dataclass
class Sample:
    """A process at a moment of the soak.

    Attributes:
        connections: between it and Redis; pools keep as many as were ever needed at once, up to a bound.
        files: its other descriptors.
    """

    requests: int
    rss_mb: float
    connections: int
    files: int


def sample(deployment: LocalDeployment, name: str, done: int) -> Sample:
    process, port = psutil.Process(deployment.processes[name].pid), urlsplit(deployment.redis_url).port
    ends = [(one.laddr.port, one.raddr.port) for one in process.net_connections("tcp") if one.raddr]
    connections = sum(port in both for both in ends)
    files = descriptors(deployment, name) - connections
    return Sample(done, process.memory_info().rss / 2**20, connections, files)


def slope_mb(samples: list[Sample]) -> float:
    """Megabytes in 1,000 requests: a line through the second half, when caches are full."""
    half = samples[len(samples) // 2 :]
    mean_x, mean_y = (sum(values) / len(half) for values in ([s.requests for s in half], [s.rss_mb for s in half]))
    spread = sum((s.requests - mean_x) ** 2 for s in half)
    return 1000 * sum((s.requests - mean_x) * (s.rss_mb - mean_y) for s in half) / spread if spread else 0.0


@pytest.mark.timeout(SOAK_S + 300)
async def test_22_soak(tally: Tally) -> None:
    """About 70 % load with random kills of workers; gateway and Redis live through it and must not grow."""
    rng, until = random.Random(22), time.monotonic() + SOAK_S
    async with (
        light_deployment(
            settings={"job_keep_s": JOB_KEEP_S, "result_keep_s": JOB_KEEP_S},
            encoders=2,
            denoisers=2,
            decoders=2,
            slots=8,
        ) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        sent: list[Asked] = []
        samples: dict[str, list[Sample]] = {"gateway": [], "redis": []}
        keys: list[int] = []

        async def one(asked: Asked) -> None:
            assert await ask(client, asked) == asked.files, asked

        async def kill_workers() -> None:
            while True:
                await asyncio.sleep(rng.uniform(4, 8))
                await deployment.kill(rng.choice([name for name in deployment.processes if name[-1].isdigit()]))

        killing = asyncio.create_task(kill_workers())
        async with redis.from_url(deployment.redis_url) as store, asyncio.TaskGroup() as asking:
            while time.monotonic() < until:
                # Sixteen slots of 20 ms steps could make eighty images of ten steps in a second; a machine with two
                # cores carries about half of that besides.
                await asyncio.sleep(rng.expovariate(20))
                [asked] = requests(1, f"soak{len(sent)}", steps=10)
                sent.append(asked)
                asking.create_task(one(asked))
                if len(sent) % 100 == 0:
                    for name, seen in samples.items():
                        seen.append(sample(deployment, name, len(sent)))
                    keys.append(await store.dbsize())
        killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killing
        # What is delivered is kept for a minute; the last ones are read again.
        await check(deployment, client, sent[-200:], tally)
        tally.requests = len(sent)
    tally.note = "; ".join(
        [f"in {SOAK_S:.0f} s, keys {keys[0]} to {keys[-1]} (most {max(keys)})"]
        + [f"{name} {described(seen)}" for name, seen in samples.items()]
    )
    half = len(keys) // 2
    for seen in samples.values():
        files = [one.files for one in seen]
        assert files[-1] <= max(files[: half + 1]) + 5
    assert max(one.connections for one in samples["gateway"]) <= MAX_CONNECTIONS + 2
    # Of each request its job stays for a while, and results until they are freed; nothing else.
    assert keys[-1] <= 2 * len(sent) + 50
    if SOAK_S > 4 * JOB_KEEP_S:
        assert max(keys[half:]) < 1.2 * max(keys[:half])
        assert all(slope_mb(seen) < 1.0 for seen in samples.values())


def described(samples: list[Sample]) -> str:
    files, connections = ([getattr(one, name) for one in samples] for name in ("files", "connections"))
    return (
        f"{samples[0].rss_mb:.1f} to {samples[-1].rss_mb:.1f} MiB, {slope_mb(samples):+.2f} MiB per 1,000 requests in "
        f"the second half, connections to Redis {min(connections)} to {max(connections)}, other descriptors "
        f"{min(files)} to {max(files)}"
    )
