"""The harness turns red for a protocol that is wrong: a copy of the product with one mistake must fail its rows."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis.asyncio as redis

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from tests.faults.harness import LEASE_S, LIGHT, Tally, check, everything, light_deployment, requests

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
# So much later than it should be done: then what was lost shows as DEADLINE.
PATIENCE_S = 8.0
# What a zombie does comes no later than this: sixty steps of 20 ms, on a busy machine.
LATE_S = 2.5

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
    """A mistake: `old` becomes `new` in scripts; the scenario must then fail."""

    scenario: Scenario
    changes: Sequence[tuple[str, str, str]]


MUTANTS = {
    "acknowledged on receipt": Mutant(
        a_denoiser_is_killed,
        [("take.lua", "'COUNT', count - #taken, 'STREAMS'", "'COUNT', count - #taken, 'NOACK', 'STREAMS'")],
    ),
    # What a pipeline of XADD and XACK does when memory is full.
    "acknowledged although nothing could be written": Mutant(
        memory_is_full,
        [
            ("advance.lua", "go_on_when_full()\n", ""),
            ("advance.lua", "enqueue(id, index, to,", "pcall(enqueue, id, index, to,"),
        ],
    ),
    "a work stream with a greatest length": Mutant(
        a_denoiser_is_killed,
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
        [
            ("advance.lua", "if place(id, index) ~= from .. ':' .. entry then", "if false then"),
            ("finish.lua", "if place(id, index) ~= stage .. ':' .. entry then", "if false then"),
            # A heartbeat would tell the zombie; it must not be what saves it.
            ("heartbeat.lua", "lost[#lost + 1] = entry", "local _ = entry"),
            ("heartbeat.lua", "cancelled[#cancelled + 1] = entry", "local _ = entry"),
        ],
    ),
}


QUICKEST = "no compare-and-set"
OTHERS = MUTANTS.keys() - {QUICKEST}


def copied(folder: Path, changes: Sequence[tuple[str, str, str]]) -> Mapping[str, Sequence[str]]:
    """Commands that run a copy of the product in which these changes were made."""
    for name in ("streamflow", "gateway", "services", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script, old, new in changes:
        path = folder / "streamflow" / "transport" / "scripts" / script
        source = path.read_text("utf-8")
        assert old in source, f"{script} has no {old!r} any more: mend the mutant"
        path.write_text(source.replace(old, new), "utf-8")
    start = (
        "import runpy, sys; folder, module = sys.argv[1:3]; del sys.argv[1:3]; sys.path.insert(0, folder); "
        "runpy.run_module(module, run_name='__main__', alter_sys=True)"
    )
    return {
        name: (sys.executable, "-c", start, str(folder), module, *arguments)
        for name, (_, _, module, *arguments) in LIGHT.items()
    }


@asynccontextmanager
async def deployment_of(folder: Path, changes: Sequence[tuple[str, str, str]]) -> AsyncIterator[LocalDeployment]:
    async with light_deployment(commands=copied(folder, changes), denoisers=2, slots=8) as deployment:
        yield deployment


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.full) for name in OTHERS), QUICKEST])
async def test_23_a_mutant_turns_it_red(name: str, tally: Tally, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    async with (
        deployment_of(tmp_path / "copy", mutant.changes) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        with pytest.raises(AssertionError):
            await mutant.scenario(deployment, client, Tally("mutant"))
    tally.requests = 12


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
