"""Stage workers in processes that die, and a Redis that is away: what they had in hand is done by others."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from streamflow.errors import UnavailableError
from streamflow.transport.embedded import EmbeddedRedis, find_redis_server, redis_version
from streamflow.types import JobState, Stage
from tests.transport.workers import STEADY, Hold, ended, make_worker, running
from tests.transport.worlds import FAST, QUIET, World, new_job, redis_binary


@pytest.fixture
async def one_world(deployment: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Processes take long to start, and both versions of Redis have been compared above."""
    has_7 = any(redis_version(binary).startswith("7.") for binary in find_redis_server())
    world = World(deployment, request.getfixturevalue("redis_7" if has_7 else "redis_62"))
    yield world
    await world.close()


def spawn(world: World, worker_id: str, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.transport.lone_worker", world.server.url, world.deployment, worker_id, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def test_work_of_a_killed_process_goes_to_another(one_world, eventually):
    transport = one_world.open(policy=FAST)
    await transport.admit(new_job(num_images=2))
    with spawn(one_world, "killed", "hangs") as process:
        lines = [await asyncio.to_thread(process.stdout.readline) for _ in range(2)]
        assert sorted(lines) == ["a:0 1\n", "a:1 1\n"]
        process.kill()
    hold = Hold()
    hold.let_go.set()
    async with running(make_worker(transport, hold)):
        assert (await eventually(ended(transport))).state is JobState.IMAGES
    assert sorted(hold.seen) == [("a:0", 2), ("a:1", 2)]


async def test_a_terminated_process_hands_back_at_once(one_world):
    transport = one_world.open(policy=replace(FAST, lease_s=600))
    await transport.admit(new_job(num_images=2))
    with spawn(one_world, "terminated", "hangs") as process:
        for _ in range(2):
            await asyncio.to_thread(process.stdout.readline)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 20) == 0
    entries = await transport.read(Stage.ENCODE, "other", 9, block_s=0)
    assert [entry.attempt for entry in entries] == [1, 1]


async def test_an_image_that_kills_its_workers_is_given_up(one_world, eventually):
    transport = one_world.open(policy=FAST)
    await transport.admit(new_job())
    attempts = []
    for k in range(3):
        with spawn(one_world, f"w{k}", "dies") as process:
            attempts.append(await asyncio.to_thread(process.stdout.readline))
            assert await asyncio.to_thread(process.wait) == -signal.SIGKILL
    assert attempts == ["a:0 1\n", "a:0 2\n", "a:0 3\n"]
    hold = Hold()
    async with running(make_worker(transport, hold)):
        view = await eventually(ended(transport))
    assert (view.state, view.failure.stage, hold.seen) == (JobState.ERROR, "encoder", [])
    assert await transport.backlog() == QUIET


@pytest.mark.parametrize("version", ["6.2", "7"])
async def test_a_worker_goes_on_after_redis_was_away(version, deployment, eventually):
    with EmbeddedRedis(binary=redis_binary(version)) as server:
        world = World(deployment, server)
        gateway = world.open(policy=STEADY)
        hold = Hold()
        worker = make_worker(world.open(policy=STEADY), hold)
        async with running(worker):
            await gateway.admit(new_job())
            await eventually(hold.has(1))
            server.kill()
            # The outcome is there and has nowhere to go.
            hold.let_go.set()
            with pytest.raises(UnavailableError):
                await gateway.ping()
            server.start()
            assert (await eventually(ended(gateway))).state is JobState.IMAGES
            await gateway.admit(new_job("next"))
            assert (await eventually(ended(gateway, "next"))).state is JobState.IMAGES
        await world.close()
    assert [ref for ref, _ in hold.seen] == ["a:0", "next:0"]
