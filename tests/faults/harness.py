"""A deployment of real processes with light stages, and what must hold after every fault."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import redis.asyncio as redis

from streamflow.cli.supervisor import COMMANDS, SERVICES, LocalDeployment
from streamflow.client import AsyncClient, ImageReady
from streamflow.errors import NotFoundError, StreamFlowError
from streamflow.types import JobState, Stage
from streamflow.v1 import types_pb2
from tests.faults.light_stage import picture

LEASE_S = 2.0
ATTEMPTS = 3
"""Of an image, before it is given up."""
SIZE_PX = 64
SHAPES = Path(__file__).parents[2] / "models" / "shapes"
LIGHT = {
    **COMMANDS,
    **{name: (sys.executable, "-m", "tests.faults.light_stage", name) for name in ("encoder", "denoiser", "decoder")},
}


@dataclass(frozen=True)
class Asked:
    """A request, and the state in which it must end."""

    request_id: str
    prompt: str
    seed: int
    steps: int
    num_images: int = 1
    state: JobState = JobState.IMAGES

    @property
    def files(self) -> list[bytes]:
        """The pictures that it gives."""
        seeds = range(self.seed, self.seed + self.num_images)
        return [picture(self.prompt, seed, self.steps, width=SIZE_PX, height=SIZE_PX) for seed in seeds]

    @property
    def options(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "seed": self.seed,
            "steps": self.steps,
            "num_images": self.num_images,
            "width": SIZE_PX,
            "height": SIZE_PX,
        }


def requests(count: int, name: str, *, steps: int = 8, several: int = 5) -> list[Asked]:
    """Requests with ids of their own; every `several`th asks for three images."""
    return [
        Asked(
            request_id=f"{name}-{k}",
            prompt=f"picture {k} of {name}",
            seed=1000 * k,
            steps=max(1, steps - k % 7),
            num_images=3 if k % several == 1 else 1,
        )
        for k in range(count)
    ]


@dataclass
class Tally:
    """What became of the requests of one fault.

    Attributes:
        recovery_s: how long the fault was felt, where it was measured.
        note: what else was seen.
    """

    fault: str
    requests: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    recovery_s: float | None = None
    seconds: float = 0.0
    note: str = ""


@asynccontextmanager
async def light_deployment(
    *,
    settings: Mapping[str, object] | None = None,
    commands: Mapping[str, Sequence[str]] = LIGHT,
    **more: Any,
) -> AsyncIterator[LocalDeployment]:
    """A deployment on light stages; `more` are arguments of LocalDeployment, such as numbers of replicas."""
    merged = {"lease_s": LEASE_S, **(settings or {})}
    async with LocalDeployment(
        model=SHAPES, commands=commands, settings=merged, ready_timeout_s=60.0, grace_s=5.0, **more
    ) as deployment:
        yield deployment


async def ask(client: AsyncClient, asked: Asked, *, timeout_s: float | None = None) -> list[bytes] | StreamFlowError:
    """The files, or the error with which the request ended."""
    try:
        return list((await client.generate(asked.prompt, timeout_s=timeout_s, **asked.options)).files)
    except StreamFlowError as error:
        return error


async def everything(client: AsyncClient, sent: Sequence[Asked], *, timeout_s: float | None = None) -> None:
    """Asks for all at once; each must come with its pictures."""
    answers = await asyncio.gather(*(ask(client, asked, timeout_s=timeout_s) for asked in sent))
    for asked, answer in zip(sent, answers, strict=True):
        assert answer == asked.files, (asked, answer if isinstance(answer, Exception) else "other pictures")


async def keep_under_way(
    client: AsyncClient, enough: asyncio.Event, name: str, *, steps: int, at_once: int
) -> list[Asked]:
    """Keeps so many requests under way until it is enough; each must come with its pictures. Returns them all."""
    coming, sent = iter(requests(10_000, name, steps=steps)), list[Asked]()

    async def one_after_the_other() -> None:
        while not enough.is_set():
            sent.append(asked := next(coming))
            await everything(client, [asked])

    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(one_after_the_other())
    return sent


def assert_under_way(work: asyncio.Task[Any]) -> None:
    """A fault must come before it is done."""
    if work.done():
        work.result()
        pytest.fail("the requests were done before the fault came")


@dataclass
class Drained:
    """What processes said of themselves when they drained: give `take` to a deployment with JSON logs as `on_line`."""

    counters: Counter[str] = field(default_factory=Counter)
    processes: set[str] = field(default_factory=set)

    def take(self, name: str, line: str) -> None:
        if '"drained"' in line:
            said = json.loads(line)
            self.processes.add(name)
            self.counters.update(said.get("counters", {}))


async def check(
    deployment: LocalDeployment, client: AsyncClient, sent: Sequence[Asked], tally: Tally, *, fetched: bool = True
) -> None:
    """Every accepted request has its one state and its pictures, and nothing is left behind.

    Args:
        fetched: clients had the pictures, and compared them; then those of more than a minute ago may be gone.
    """
    tally.requests += len(sent)
    for asked in sent:
        try:
            job = await client.job(asked.request_id)
        except NotFoundError:
            tally.lost.append(asked.request_id)
            continue
        if job.state is not asked.state:
            tally.wrong.append(f"{asked.request_id}: {job.state}, not {asked.state}")
        elif asked.state is JobState.IMAGES:
            try:
                if await read_again(client, asked.request_id) != asked.files:
                    tally.wrong.append(f"{asked.request_id}: other pictures")
            except NotFoundError:
                if not fetched:
                    tally.wrong.append(f"{asked.request_id}: no pictures")
    assert not tally.lost, tally
    assert not tally.wrong, tally
    await settled(deployment)


async def counters(deployment: LocalDeployment, name: str) -> Mapping[str, int]:
    """What a stage has counted up to now; the gateway's status is some seconds old."""
    async with grpc.aio.insecure_channel(deployment.addresses[name]) as channel:
        status = channel.unary_unary(
            f"/{SERVICES[name.partition('-')[0]]}/Status",
            request_serializer=types_pb2.StatusRequest.SerializeToString,
            response_deserializer=types_pb2.StageStatus.FromString,
        )
        return Counter((await status(types_pb2.StatusRequest(), timeout=10.0)).counters)


def descriptors(deployment: LocalDeployment, name: str) -> int:
    """Open files of a process."""
    return len(os.listdir(f"/proc/{deployment.processes[name].pid}/fd"))


async def read_again(client: AsyncClient, request_id: str) -> list[bytes]:
    """The pictures of a job that has ended, from the store."""
    files = {event.info.index: event.data async for event in client.watch(request_id) if isinstance(event, ImageReady)}
    return [files[index] for index in sorted(files)]


async def settled(deployment: LocalDeployment, *, within_s: float = 10.0) -> None:
    """Waits until nothing is under way and checks that nothing is pending, queued or reserved beyond what is stored."""
    async with redis.from_url(deployment.redis_url) as store:
        until = time.monotonic() + within_s
        while left := await leftovers(store):
            assert time.monotonic() < until, left
            await asyncio.sleep(0.05)


async def held_by(store: redis.Redis, workers: Collection[str]) -> int:
    """How many entries are in the hands of these workers; `store` decodes its responses."""
    count = 0
    for stage in Stage:
        async for key in store.scan_iter(match=f"sf:v1:*:{stage.value}:*", _type="stream"):
            for consumer in await store.xinfo_consumers(key, "workers"):
                count += int(consumer["pending"]) * (consumer["name"] in workers)
    return count


async def worker_ids(deployment: LocalDeployment, store: redis.Redis, names: Sequence[str]) -> dict[str, str]:
    """By which the streams know these processes, the youngest at their addresses; `store` decodes its responses."""
    said = [json.loads(text.partition(" ")[2]) for text in await store.hvals("sf:v1:{default}:workers")]
    said.sort(key=lambda worker: worker["started_at_s"])
    at = {worker["address"]: str(worker["worker_id"]) for worker in said}
    return {name: at[deployment.addresses[name]] for name in names if deployment.addresses[name] in at}


async def storm_kill(deployment: LocalDeployment, deck: list[str]) -> str | None:
    """Kills the last one of the deck and takes it off, or puts it first where it must wait.

    None is killed that is down, or has an image in its last attempt: nobody innocent is to be given up.
    """
    name = deck.pop()
    process = deployment.processes[name]
    if process.running:
        # Workers stand still while they are looked at: what they take in between could be in its last attempt.
        if name[-1].isdigit():
            os.kill(pid := process.pid, signal.SIGSTOP)
            if await _in_last_attempt(deployment, name):
                os.kill(pid, signal.SIGCONT)
            else:
                await process.kill()
                return name
        elif await process.kill():
            return name
    deck.insert(0, name)
    return None


async def _in_last_attempt(deployment: LocalDeployment, name: str) -> bool:
    last = set[str]()
    # A connection of its own: Redis may have been killed since the last time.
    async with redis.from_url(deployment.redis_url, decode_responses=True) as store:
        for stage in Stage:
            async for key in store.scan_iter(match=f"sf:v1:*:{stage.value}:*", _type="stream"):
                pending = await store.xpending_range(key, "workers", "-", "+", 1000)
                last |= {entry["consumer"] for entry in pending if entry["times_delivered"] >= ATTEMPTS}
        known = await worker_ids(deployment, store, [one for one in deployment.addresses if one[-1].isdigit()])
    # A worker of which we do not know whose it is may be this one.
    return bool(last - set(known.values())) or known.get(name) in last


async def leftovers(store: Any) -> dict[str, Any]:
    """What is there and should not be, by name."""
    found: dict[str, Any] = {}
    prefix = "sf:v1:{default}:"
    for name, count in (("waiting", store.zcard), ("open", store.zcard), ("watch", store.zcard)):
        if number := await count(prefix + name):
            found[name] = number
    if number := await store.scard(prefix + "under_way"):
        found["under_way"] = number
    for stage in Stage:
        async for key in store.scan_iter(match=f"{prefix}{stage.value}:*"):
            if number := await store.xlen(key):
                found[key.decode()] = number
            # An entry that was deleted but not acknowledged would be pending for ever.
            for group in await store.xinfo_groups(key):
                if group["pending"]:
                    found[f"pending of {key.decode()}"] = group["pending"]
    for tenant, number in (await store.hgetall(prefix + "tenants")).items():
        if tenant.startswith(b"n:") and int(number):
            found[tenant.decode()] = int(number)
    reserved = int(await store.hget(prefix + "meta", "reserved") or 0)
    # By the books, not by the keys: Redis lets results expire a moment before the reaper notices.
    stored = 0
    for ref in await store.zrange(prefix + "results", 0, -1):
        job_id, _, index = ref.decode().rpartition(":")
        stored += int(await store.hget(f"{prefix}job:{job_id}", f"b{index}") or 0)
    if reserved != stored:
        found["reserved"] = f"{reserved} bytes for {stored} stored"
    return found
