"""What happens to the machine under Redis: slow disks, cut power, full memory, full disks, clocks that jump."""

from __future__ import annotations

import asyncio
import itertools
import random
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
import redis
import redis.asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamflow.cli.supervisor import SERVICES, LocalDeployment
from streamflow.client import AsyncClient
from streamflow.transport.embedded import EmbeddedRedis, find_redis_server
from streamflow.transport.keys import Keys
from streamflow.types import JobState, Stage
from tests.faults import shims
from tests.faults.harness import Asked, Tally, assert_under_way, check, everything, light_deployment, requests
from tests.faults.light_stage import CURSE
from tests.faults.submitted import Submitted, assert_busy, refusal

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

FSYNC_MS = 20
CUTS = 25
DISK_BYTES = 8 * 2**20
KEYS = Keys("default")


def redis_server(
    folder: Path,
    *,
    preload: Sequence[Path] = (),
    environment: Mapping[str, object] | None = None,
    directory: Path | None = None,
    maxmemory_bytes: int = 0,
    **options: str,
) -> EmbeddedRedis:
    """The product's Redis, with libraries put under it and options over its own (`_` for `-`)."""
    environment = {**(environment or {}), "LD_PRELOAD": ":".join(map(str, preload))}
    settings = shlex.join(f"{name}={value}" for name, value in environment.items())
    extra = shlex.join(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value))
    program = folder / "redis-server"
    program.write_text(f'#!/bin/sh\nexec env {settings} {find_redis_server()[0]} "$@" {extra}\n')
    program.chmod(0o700)
    return EmbeddedRedis(directory=directory or folder / "data", binary=program, maxmemory_bytes=maxmemory_bytes)


def append_only_file(folder: Path) -> Path:
    """The one that grows; Redis 7 has a base and a manifest beside it."""
    return max(folder.rglob("*.aof"), key=lambda path: path.stat().st_size)


@pytest.mark.full
async def test_6b_redis_killed_with_slow_fsync(tally: Tally, tmp_path: Path) -> None:
    preload = [shims.build("slow_fsync", tmp_path)]
    with redis_server(tmp_path, preload=preload, environment={"FAULT_FSYNC_MS": FSYNC_MS}) as server:
        await ended_three_times(server, requests(100, "slow", steps=10), tally)


@pytest.mark.full
async def test_7_power_cut(tally: Tally, tmp_path: Path) -> None:
    # Slow as well, so that the cut comes while bytes are on their way to the disk.
    preload = [shims.build("slow_fsync", tmp_path), shims.build("fsync_log", tmp_path)]
    log, cut_bytes = shims.FsyncLog(tmp_path / "fsync.log"), 0
    environment = {"FAULT_FSYNC_MS": FSYNC_MS, "FAULT_FSYNC_LOG": log.path}

    def cut() -> None:
        nonlocal cut_bytes
        cut_bytes += cut_to(append_only_file(tmp_path / "data"), log)

    with redis_server(tmp_path, preload=preload, environment=environment) as server:
        await ended_three_times(server, requests(100, "power", steps=10), tally, while_down=cut)
    assert cut_bytes, "all that was written was on the disk already"


async def ended_three_times(
    server: EmbeddedRedis, sent: list[Asked], tally: Tally, *, while_down: Callable[[], None] = lambda: None
) -> None:
    """SIGKILL while requests are admitted: what was answered is there afterwards, and ends with its pictures."""
    async with (
        light_deployment(redis_url=server.url, slots=16) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        submitted = Submitted(client)
        work = asyncio.create_task(submitted.submit(sent))
        for part in (1, 2, 3):
            await submitted.reach(part * len(sent) // 4)
            assert_under_way(work)
            server.kill()
            while_down()
            server.start()
            tally.lost += await submitted.lost()
            assert not tally.lost, tally
        await work
        await submitted.ended()
        await check(deployment, client, sent, tally, fetched=False)


def cut_to(file: Path, log: shims.FsyncLog) -> int:
    """Leaves of the file what was on the disk for certain; returns how many bytes went."""
    before, safe = file.stat().st_size, log.safe_bytes(file)
    assert 0 < safe <= before
    with file.open("r+b") as opened:
        opened.truncate(safe)
    return before - safe


async def test_8_torn_tail_of_the_append_only_file(tally: Tally, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    await record(whole, tally)
    rng, seen = random.Random(8), Counter[str]()
    size = append_only_file(whole).stat().st_size
    for number in range(CUTS):
        torn = tmp_path / f"torn-{number}"
        shutil.copytree(whole, torn)
        with append_only_file(torn).open("r+b") as opened:
            # Once near the end, where there is an image in each of its ends.
            opened.truncate(rng.randrange(1, size) if number else size - 1)
        server = EmbeddedRedis(directory=torn)
        try:
            server.start()
            with redis.Redis.from_url(server.url, decode_responses=True, encoding_errors="replace") as store:
                places, wrong = survey(store)
        finally:
            server.kill()
        assert not wrong, (number, wrong)
        seen.update(places)
    # Or there would have been nothing to tear apart.
    assert all(seen[place] for place in ("waiting", *Stage, "done", "cancelled", "error")), seen


async def record(folder: Path, tally: Tally) -> None:
    """Fills the folder with the history of a run in which images end in all ways."""
    sent = requests(25, "torn", steps=12, several=3)
    bad = Asked("torn-bad", f"a {CURSE}", 1, 4, num_images=3, state=JobState.ERROR)
    dropped = [Asked(f"torn-dropped-{k}", "cancelled", k, 100, 2, state=JobState.CANCELLED) for k in range(3)]
    with redis_server(folder.parent, directory=folder) as server:
        async with (
            light_deployment(redis_url=server.url, slots=4) as deployment,
            AsyncClient(deployment.address) as client,
        ):
            submitted = Submitted(client)
            await submitted.submit([*sent[:10], bad, *dropped, *sent[10:]])
            await asyncio.sleep(0.3)
            for asked in dropped:
                await client.cancel(asked.request_id)
            await submitted.ended()
            await check(deployment, client, [*sent, bad, *dropped], tally, fetched=False)


def survey(store: redis.Redis) -> tuple[Counter[str], list[str]]:
    """How many images are where, and every image that is not in the one place that its job names."""
    entries: dict[str, list[str]] = {}
    for stage in Stage:
        for key in store.scan_iter(match=pattern(f"{stage.value}:") + "*", _type="stream"):
            for entry_id, fields in store.xrange(key):
                entries.setdefault(f"{fields['job']}:{fields['index']}", []).append(f"{stage.value}:{entry_id}")
    for ref in store.zrange(KEYS.waiting, 0, -1):
        entries.setdefault(ref, []).append("waiting")
    under_way = store.smembers(KEYS.under_way)

    places, wrong = Counter[str](), []
    for key in store.scan_iter(match=pattern("job:") + "*", _type="hash"):
        id_, job, live = key.removeprefix(KEYS.job("")), store.hgetall(key), 0
        for index in range(int(job["images"])):
            ref, named = f"{id_}:{index}", job.get(f"i{index}", "nowhere")
            is_live = named == "waiting" or ":" in named
            found, passing = entries.pop(ref, []), ref in under_way
            if found != [named] * is_live or passing is not (":" in named):
                wrong.append(f"{ref} is {named}, but in {found}{' and under way' * passing}")
            if named == "done" and not store.exists(KEYS.result(id_, index)):
                wrong.append(f"{ref} is done without a picture")
            live += is_live
            places[named.partition(":")[0]] += 1
        is_open = store.zscore(KEYS.open, id_) is not None
        if int(job["left"]) != live or is_open is not (job["state"] in ("queued", "running")):
            wrong.append(f"{id_} is {job['state']}, {job['left']} left of {live}{', open' * is_open}")
    return places, wrong + [f"{ref} of no job in {found}" for ref, found in entries.items()]


def pattern(name: str) -> str:
    return KEYS.prefix.replace("{", "\\{") + name


async def test_12_redis_out_of_memory(tally: Tally, tmp_path: Path) -> None:
    admitted, later = requests(40, "admitted", steps=40), requests(8, "later")
    with redis_server(tmp_path, maxmemory_bytes=60 * 10**6) as server:
        async with (
            light_deployment(redis_url=server.url, slots=8) as deployment,
            AsyncClient(deployment.address) as client,
            redis.asyncio.from_url(server.url) as store,
        ):
            # Most of it before there is work, which would be done by the time that all is full.
            await fill_memory(store, leave_bytes=10 * 2**20)
            submitted = Submitted(client)
            await submitted.submit(admitted)
            await fill_memory(store)
            assert len(await store.zrange(KEYS.waiting, 0, -1)) > 10, "the work was done before memory was full"
            await assert_busy(deployment, later[0])
            patient = asyncio.create_task(everything(client, later))
            await submitted.ended()
            await assert_busy(deployment, later[0])
            assert_under_way(patient)
            await store.delete("ballast", "rest")
            await patient
            await check(deployment, client, admitted, tally, fetched=False)
            await check(deployment, client, later, tally)


async def fill_memory(store: redis.asyncio.Redis, *, leave_bytes: int = 0) -> None:
    """Fills Redis up, and a little over, so that what is freed meanwhile makes no room; or leaves so much."""
    for number in itertools.count(await store.hlen("ballast")):
        memory = await store.info("memory")
        if leave_bytes and memory["used_memory"] > memory["maxmemory"] - leave_bytes:
            return
        try:
            await store.hset("ballast", str(number), bytes(2**18))
        except redis.exceptions.OutOfMemoryError:
            break
    await store.hdel("ballast", str(number - 1), str(number - 2))
    # A command of a few bytes that takes megabytes.
    await store.setrange("rest", 8 * 2**20, b"x")


@pytest.mark.full
@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
async def test_13_disk_full(appendfsync: str, tally: Tally, tmp_path: Path) -> None:
    # With "always" Redis ends itself when it cannot write, and is started again; with "everysec" it refuses writes.
    sent, detached = requests(20, "watched", steps=60), requests(20, "detached", steps=60)
    with small_disk(tmp_path) as disk, redis_on(disk, tmp_path, appendfsync) as options:
        async with light_deployment(slots=8, **options) as deployment, AsyncClient(deployment.address) as client:
            submitted = Submitted(client)
            await submitted.submit(detached)
            work = asyncio.create_task(everything(client, sent))
            await asyncio.sleep(0.5)
            fill_disk(disk)
            await until_ready(deployment, False)
            error = await refusal(deployment, Asked("refused", "no room", 1, 4))
            assert error is not None
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            assert_under_way(work)
            (disk / "filler").unlink()
            await until_ready(deployment, True)
            await work
            await submitted.ended()
            await check(deployment, client, detached, tally, fetched=False)
            await check(deployment, client, sent, tally)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 8 MB in namespaces of its own, as its holder sees it; it goes with its holder."""
    mount_point = folder / "disk"
    mount_point.mkdir()
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mount_point)])
    # It ends when its input does, so in whatever way this process ends.
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", f"{mount} && echo mounted && exec cat >/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"mounted\n":
            pytest.skip("needs a file system of its own, and `unshare -rm` may not mount one here")
        yield Path(f"/proc/{holder.pid}/root{mount_point}")


@contextmanager
def redis_on(disk: Path, folder: Path, appendfsync: str) -> Iterator[dict[str, object]]:
    """What tells a deployment of a Redis with its data there."""
    if appendfsync == "always":
        yield {"data_dir": disk}
        return
    with redis_server(folder, directory=disk, appendfsync=appendfsync) as server:
        yield {"redis_url": server.url}


def fill_disk(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        for piece in (bytes(2**16), bytes(2**12)):
            with suppress(OSError):
                while filler.write(piece):
                    pass


async def until_ready(deployment: LocalDeployment, ready: bool) -> None:
    """Returns when the gateway's health says so."""
    request = health_pb2.HealthCheckRequest(service=SERVICES["gateway"])
    wanted = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    async with grpc.aio.insecure_channel(deployment.address) as channel, asyncio.timeout(30):
        while (await health_pb2_grpc.HealthStub(channel).Check(request)).status != wanted:  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.05)


@pytest.mark.full
async def test_17_the_clock_of_redis_jumps(tally: Tally, tmp_path: Path) -> None:
    preload, clock = [shims.build("clock", tmp_path)], shims.Clock(tmp_path / "clock")
    sent, watched = requests(60, "clock", steps=40), requests(20, "watched", steps=100)
    shifts_s = (120, 0, -120, 0)
    hurried = requests(4 * len(shifts_s), "hurried", steps=10)
    with redis_server(tmp_path, preload=preload, environment={"FAULT_CLOCK": clock.path}) as server:
        async with (
            light_deployment(redis_url=server.url, denoisers=2, slots=8) as deployment,
            AsyncClient(deployment.address) as client,
            AsyncClient(deployment.address, timeout_s=180.0, max_busy_retries=0) as hurried_client,
            redis.asyncio.from_url(server.url) as store,
        ):
            submitted = Submitted(client)
            submitting = asyncio.create_task(submitted.submit(sent))
            asking = [asyncio.create_task(everything(client, watched))]
            began_s = (await store.time())[0]
            for number, shift_s in enumerate(shifts_s):
                await asyncio.sleep(0.7)
                clock.shift(shift_s)
                assert abs((await store.time())[0] - began_s - shift_s) < 60
                # A jump is no work: nobody is refused because images seem to take minutes.
                part = hurried[number :: len(shifts_s)]
                asking.append(asyncio.create_task(everything(hurried_client, part)))
            assert_under_way(asking[0])
            await submitting
            await asyncio.gather(*asking)
            await submitted.ended()
            for asked in [*watched, *hurried]:
                # Not its pictures: a minute after they were delivered they may go, and that minute has jumped by.
                assert (await client.job(asked.request_id)).state is JobState.IMAGES
                assert await store.hget(KEYS.job(asked.request_id), "left") == b"0"
            tally.requests += len(watched) + len(hurried)
            await check(deployment, client, sent, tally, fetched=False)
