"""The harness turns red for a protocol that is wrong: a copy of the product with one mistake must fail its rows."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis.asyncio as redis

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from tests.faults.copied import UNHEARD, Change, copied
from tests.faults.harness import LEASE_S, Tally, check, everything, light_deployment, requests

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

# So much later than it should be done: then what was lost shows as DEADLINE.
PATIENCE_S = 8.0
# What a zombie does comes no later than this: sixty steps of 20 ms, on a busy machine.
LATE_S = 2.5

LOST = r"DeadlineError\('not finished within"
TWICE = r"'reserved': '-\d+ bytes"
"""What was reserved for an image is given back each time that it ends."""

Scenario = Callable[[LocalDeployment, AsyncClient, Tally], Awaitable[None]]


async def a_denoiser_is_killed(deployment: LocalDeployment, client: AsyncClient, tally: Tally) -> None:
    sent = requests(12, "killed", steps=40)
    work = asyncio.create_task(everything(client, sent, timeout_s=PATIENCE_S))
    await asyncio.sleep(0.6)
    await deployment.kill("denoiser-1")
    await work
    await check(deployment, client, sent, tally)


async def memory_is_full(deployment: LocalDeployment, client: AsyncClient, tally: Tally) -> None:
    sent = requests(12, "full", steps=40)
    work = asyncio.create_task(everything(client, sent, timeout_s=PATIENCE_S))
    await asyncio.sleep(0.5)
    async with redis.from_url(deployment.redis_url) as store:
        await store.config_set("maxmemory", 1)
        await asyncio.sleep(2.0)
        await store.config_set("maxmemory", 0)
    await work
    await check(deployment, client, sent, tally)


async def a_zombie_comes_back(deployment: LocalDeployment, client: AsyncClient, tally: Tally) -> None:
    sent = requests(12, "zombie", steps=60)
    work = asyncio.create_task(everything(client, sent, timeout_s=PATIENCE_S + 2 * LEASE_S))
    await asyncio.sleep(0.6)
    frozen = deployment.processes["denoiser-1"].pid
    os.kill(frozen, signal.SIGSTOP)
    await asyncio.sleep(2 * LEASE_S)
    os.kill(frozen, signal.SIGCONT)
    await work
    await asyncio.sleep(LATE_S)
    await check(deployment, client, sent, tally)


@dataclass(frozen=True)
class Mutant:
    """A mistake in the scripts; the scenario must then fail, for this reason (a regular expression)."""

    scenario: Scenario
    reason: str
    changes: Sequence[Change]


MUTANTS = {
    "acknowledged on receipt": Mutant(
        a_denoiser_is_killed,
        LOST,
        [("take.lua", "'COUNT', count - #taken, 'STREAMS'", "'COUNT', count - #taken, 'NOACK', 'STREAMS'")],
    ),
    # What a pipeline of XADD and XACK does when memory is full.
    "acknowledged although nothing could be written": Mutant(
        memory_is_full,
        LOST,
        [
            ("advance.lua", "go_on_when_full()\n", ""),
            ("advance.lua", "enqueue(id, index, to,", "pcall(enqueue, id, index, to,"),
        ],
    ),
    "a work stream with a greatest length": Mutant(
        a_denoiser_is_killed,
        LOST,
        [
            (
                "common.lua",
                "redis.call('XADD', stream_key(stage, job[1]), '*'",
                "redis.call('XADD', stream_key(stage, job[1]), 'MAXLEN', 2, '*'",
            )
        ],
    ),
    "no compare-and-set": Mutant(
        a_zombie_comes_back,
        TWICE,
        [
            ("advance.lua", "if place(id, index) ~= from .. ':' .. entry then", "if false then"),
            ("finish.lua", "if place(id, index) ~= stage .. ':' .. entry then", "if false then"),
            # A heartbeat would tell the zombie; it must not be what saves it.
            *UNHEARD,
        ],
    ),
}


QUICKEST = "no compare-and-set"
OTHERS = MUTANTS.keys() - {QUICKEST}


@asynccontextmanager
async def deployment_of(folder: Path, changes: Sequence[Change]) -> AsyncIterator[LocalDeployment]:
    async with light_deployment(commands=copied(folder, changes), denoisers=2, slots=8) as deployment:
        yield deployment


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.full) for name in OTHERS), QUICKEST])
async def test_23_a_mutant_turns_it_red(name: str, tally: Tally, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    async with (
        deployment_of(tmp_path / "copy", mutant.changes) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        with pytest.raises(AssertionError, match=mutant.reason) as red:
            await mutant.scenario(deployment, client, Tally("mutant"))
    found = re.search(mutant.reason, str(red.value))
    assert found is not None
    tally.requests, tally.note = 12, f"red, because of {found.group()!r}"


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(a_denoiser_is_killed, marks=pytest.mark.full),
        pytest.param(memory_is_full, marks=pytest.mark.full),
        a_zombie_comes_back,
    ],
)
async def test_23_without_a_mistake_it_stays_green(scenario: Scenario, tally: Tally, tmp_path: Path) -> None:
    async with deployment_of(tmp_path / "copy", ()) as deployment, AsyncClient(deployment.address) as client:
        await scenario(deployment, client, tally)
