"""Workers, gateways and Redis die in the middle of the work: nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from tests.faults.conftest import QUICK
from tests.faults.copied import UNHEARD, copied
from tests.faults.harness import (
    LEASE_S,
    SHAPES,
    Drained,
    Tally,
    assert_under_way,
    check,
    counters,
    everything,
    held_by,
    keep_under_way,
    light_deployment,
    requests,
    settled,
    storm_kill,
    worker_ids,
)
from tests.faults.submitted import Submitted

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

# "before-" and "after-" a call of the transport, or "working" in the middle of an entry; at the nth time.
QUICK_POINTS = (
    "denoiser:after-read:1",
    "encoder:before-advance:2",
    "denoiser:working:2",
    "decoder:after-finish:2",
)
POINTS = (
    *QUICK_POINTS,
    "encoder:after-read:1",
    "denoiser:before-advance:2",
    "encoder:working:2",
    "decoder:before-finish:2",
    "decoder:after-read:1",
    "encoder:after-advance:2",
    "denoiser:after-advance:2",
    "decoder:working:2",
    "denoiser:before-heartbeat:2",
)
COLOURS = ("red", "green", "blue", "yellow")
KILLS = 10
"""Of each of the real stages."""
STORM_S, MOST_KILLS = 1.0, 30
"""Between two kills in the storm, and how many there are: a worker takes about two seconds to come back."""


async def test_2_workers_of_every_stage_killed_in_a_storm(tally: Tally) -> None:
    rng, sent = random.Random(2), requests(50 if QUICK else 100, "storm", steps=60)
    async with (
        light_deployment(encoders=2, denoisers=2, decoders=2, slots=16) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        work, killed = asyncio.create_task(everything(client, sent)), Counter[str]()
        workers = [name for name in deployment.processes if name[-1].isdigit()]
        # One of each stage first; afterwards in random order.
        deck = [*rng.sample(workers, len(workers)), "encoder-1", "decoder-1", "denoiser-1"]
        while not work.done() and killed.total() < MOST_KILLS:
            if victim := await storm_kill(deployment, deck):
                killed[victim.partition("-")[0]] += 1
            deck = deck or rng.sample(workers, len(workers))
            await asyncio.wait({work}, timeout=STORM_S)
        await work
        await check(deployment, client, sent, tally)
    tally.note = "killed " + ", ".join(f"{count} {name}" for name, count in killed.most_common())
    assert killed.keys() == {"encoder", "denoiser", "decoder"}, killed
    assert killed.total() > (2 if QUICK else 5), killed


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_2_real_stages_killed_ten_times_each(tally: Tally) -> None:
    """One of each at once; what they had in hand is with others within two leases."""
    rng = random.Random(2)
    options = [{"seed": k, "steps": 10, "num_images": 1 + k % 2} for k in range(5)]
    async with (
        LocalDeployment(
            model=SHAPES,
            settings={"lease_s": LEASE_S},
            deterministic=True,
            threads=1,
            encoders=2,
            denoisers=2,
            decoders=2,
            slots=16,
        ) as deployment,
        AsyncClient(deployment.address) as client,
        redis.from_url(deployment.redis_url, decode_responses=True) as store,
    ):
        expected = await pictures(client, options)
        recoveries_s: list[float] = []
        held = 0
        for number in range(KILLS):
            victims = [f"{kind}-{1 + number % 2}" for kind in ("encoder", "denoiser", "decoder")]
            ids = await worker_ids(deployment, store, victims)
            assert len(ids) == len(victims), ids
            work = asyncio.create_task(pictures(client, options))
            await asyncio.sleep(rng.uniform(0.1, 0.8))
            for victim in victims:
                await deployment.kill(victim)
            began = time.monotonic()
            held += await held_by(store, ids.values()) > 0
            while await held_by(store, ids.values()):  # noqa: ASYNC110 - remote
                await asyncio.sleep(0.02)
            recoveries_s.append(time.monotonic() - began)
            assert await work == expected
            await deployment.wait_ready(*victims)
            await settled(deployment)
        tally.requests, tally.recovery_s = (1 + KILLS) * len(options), max(recoveries_s)
        tally.note = f"{held} times of {KILLS} the dead held something; others had it after {max(recoveries_s):.2f} s"
    assert held > KILLS / 2, "they were killed while they had nothing to do"
    assert max(recoveries_s) < 2 * LEASE_S


async def pictures(client: AsyncClient, options: Sequence[Mapping[str, Any]]) -> list[list[bytes]]:
    """Of the real model, for requests that are sent at once."""
    results = await asyncio.gather(
        *(client.generate(f"a large {COLOURS[k % 4]} ring", **one) for k, one in enumerate(options))
    )
    return [list(result.files) for result in results]


async def test_3_killed_at_exact_points(tally: Tally, tmp_path: Path) -> None:
    """In two deployments beside each other: most of the time goes by in waiting for leases."""
    points = QUICK_POINTS if QUICK else POINTS
    async with asyncio.TaskGroup() as tasks:
        for half in range(2):
            tasks.create_task(killed_at(points[half::2], tmp_path / f"fault-{half}", tally))


async def killed_at(points: Sequence[str], order: Path, tally: Tally) -> None:
    async with (
        light_deployment(settings={"fault": order}) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        for point in points:
            await deployment.wait_ready()
            order.with_suffix(".new").write_text(point)
            order.with_suffix(".new").rename(order)
            sent = requests(6, point.replace(":", "-"), steps=100 if "heartbeat" in point else 8)
            await everything(client, sent)
            assert not await asyncio.to_thread(order.exists), f"{point} was not reached"
            await check(deployment, client, sent, tally)


async def test_4_a_zombie_changes_nothing(tally: Tally, tmp_path: Path) -> None:
    """What it had in hand is done by others; it hears nothing of that, goes on, and all that it brings is dropped."""
    sent = requests(12, "zombie", steps=60)
    async with (
        light_deployment(commands=copied(tmp_path / "copy", UNHEARD), denoisers=2, slots=8) as deployment,
        AsyncClient(deployment.address) as client,
        redis.from_url(deployment.redis_url, decode_responses=True) as store,
    ):
        zombie = (await worker_ids(deployment, store, ["denoiser-1"])).values()
        assert zombie
        work = asyncio.create_task(everything(client, sent))
        frozen = deployment.processes["denoiser-1"].pid
        # It has work in hand, and all of that is far from its end.
        while (await counters(deployment, "denoiser-1"))["steps_total"] < 8:  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.02)
        os.kill(frozen, signal.SIGSTOP)
        began = time.monotonic()
        held = await held_by(store, zombie)
        assert held
        await work
        tally.recovery_s = time.monotonic() - began
        os.kill(frozen, signal.SIGCONT)
        async with asyncio.timeout(30):
            while (await counters(deployment, "denoiser-1"))["late_total"] < held:  # noqa: ASYNC110 - remote
                await asyncio.sleep(0.05)
        assert (await counters(deployment, "denoiser-2"))["late_total"] == 0
        await check(deployment, client, sent, tally)
    tally.note = f"{held} late images dropped"


async def test_6_redis_killed(tally: Tally) -> None:
    """Half of the requests are watched; nobody sends the others again, so what is lost of those stays lost."""
    watched, detached = requests(30, "watched", steps=60), requests(30, "detached", steps=60)
    async with light_deployment(slots=16) as deployment, AsyncClient(deployment.address) as client:
        submitted = Submitted(client)
        await submitted.submit(detached[:10])
        work = asyncio.create_task(everything(client, watched))
        for part in (detached[10:17], detached[17:24], detached[24:]):
            submitting = asyncio.create_task(submitted.submit(part))
            await asyncio.sleep(0.5)
            assert_under_way(work)
            await deployment.kill("redis")
            await deployment.wait_ready("redis")
            tally.lost += await submitted.lost()
            assert not tally.lost, tally
            await submitting
        await work
        await submitted.ended()
        await check(deployment, client, watched, tally)
        await check(deployment, client, detached, tally, fetched=False)


async def test_9_gateway_killed_while_watched(tally: Tally) -> None:
    sent = requests(40, "gateway", steps=100)
    async with light_deployment(slots=16) as deployment, AsyncClient(deployment.address) as client:
        work = asyncio.create_task(everything(client, sent))
        for _ in range(2):
            await asyncio.sleep(0.5)
            assert_under_way(work)
            await deployment.kill("gateway")
            await deployment.wait_ready("gateway")
        await work
        await check(deployment, client, sent, tally)


@pytest.mark.parametrize("grace_s", [pytest.param(5.0, marks=pytest.mark.full), 0.1])
async def test_16_rolling_restart_of_every_role_under_load(grace_s: float, tally: Tally) -> None:
    drained, enough = Drained(), asyncio.Event()
    # A lease so long that no busy machine makes a worker lose its work, which another one would begin again.
    settings = {"drain_grace_s": grace_s, "log_format": "json", "lease_s": 10.0}
    async with (
        light_deployment(
            settings=settings, on_line=drained.take, encoders=2, denoisers=2, decoders=2, slots=8
        ) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        work = asyncio.create_task(keep_under_way(client, enough, f"rolling-{grace_s:g}", steps=60, at_once=24))
        processes = {name: process for name, process in deployment.processes.items() if name != "redis"}
        for name, process in processes.items():
            assert_under_way(work)
            await deployment.restart(name)
            assert process.last_ending == "exit code 0", process
        enough.set()
        sent = await work
        await check(deployment, client, sent, tally)
    # Every process says at its end what it did: no step was made twice.
    assert drained.counters["steps_total"] == sum(asked.steps * asked.num_images for asked in sent)
    assert {process.last_ending for process in processes.values()} == {"exit code 0"}
    assert {process.restarts for process in processes.values()} == {1}


@pytest.mark.full
async def test_16_rolling_restart_of_denoisers_on_the_real_model(tally: Tally) -> None:
    """Half-finished latents go from one denoiser to the other, to the same bytes."""
    drained = Drained()
    settings = {"drain_grace_s": 0.1, "log_format": "json", "lease_s": 10.0}
    options = [{"seed": k, "steps": 25, "sampler": "pseudo", "num_images": 1 + k % 2} for k in range(6)]
    async with (
        LocalDeployment(
            model=SHAPES, settings=settings, on_line=drained.take, deterministic=True, threads=1, denoisers=2, slots=8
        ) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        expected = await pictures(client, options)
        work = asyncio.create_task(pictures(client, options))
        for name in ("denoiser-1", "denoiser-2"):
            await asyncio.sleep(1.0)
            await deployment.restart(name)
        assert await work == expected
        await settled(deployment)
        tally.requests += 2 * len(options)
    images = sum(one["num_images"] for one in options)
    # A pseudo corrector of 25 steps takes 26 evaluations; beside them are those of the warm-up.
    assert drained.counters["handed_over_total"] > 0
    assert drained.counters["evaluations_total"] == 2 * images * 26
