"""Lists, wake-ups, blobs and the registry of a transport, over memory, Redis 6.2 and Redis 7."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import asdict, dataclass, replace

import pytest
import redis

from streamflow.transport.base import ImageRef, JobPlace, PreviewTask, Transport
from streamflow.transport.replies import worker_from, worker_text
from streamflow.types import SlotView, WorkerInfo
from tests.transport.worlds import ENCODE, FAST, denoiser, new_job


async def listed(transport: Transport, **which) -> list[str]:
    return [view.id for view in await transport.jobs(**which)]


async def test_jobs_are_listed_newest_first_in_pages(transport):
    for k in range(5):
        await transport.admit(new_job(f"j{k}"))
    assert await listed(transport) == ["j4", "j3", "j2", "j1", "j0"]
    page = await transport.jobs(count=2)
    assert [view.id for view in page] == ["j4", "j3"]
    assert await listed(transport, after=page[-1].place, count=2) == ["j2", "j1"]
    assert await listed(transport, after=(await transport.job("j0")).place) == []


async def test_tenants_have_lists_of_their_own(transport):
    for k in range(5):
        await transport.admit(new_job(f"j{k}", tenant="odd" if k % 2 else "even"))
    assert await listed(transport, tenant="odd") == ["j3", "j1"]
    # The place of another tenant's job is a time, and nothing else.
    assert await listed(transport, tenant="odd", after=(await transport.job("j2")).place) == ["j1"]
    assert await listed(transport) == []


async def test_a_list_goes_on_where_its_last_job_was_reaped(world, eventually):
    transport = world.open(policy=replace(FAST, tombstone_s=0.05))
    for k in range(5):
        await transport.admit(new_job(f"j{k}"))
    after = (await transport.jobs(count=2))[-1].place
    await transport.cancel("j3")

    async def reaped():
        await transport.reap()
        return await listed(transport) == ["j4", "j2", "j1", "j0"]

    await eventually(reaped)
    assert await listed(transport, after=after, count=2) == ["j2", "j1"]


async def test_jobs_of_one_moment_are_in_the_order_of_their_ids(transport):
    for job_id in ("a", "m", "z"):
        await transport.admit(new_job(job_id))
    moment = (await transport.job("m")).admitted_at_s
    for last, rest in (("l", ["a"]), ("m", ["a"]), ("n", ["m", "a"])):
        assert await listed(transport, after=JobPlace(moment, last)) == rest


async def test_a_list_reads_no_more_than_it_gives(redis_world):
    """A tenant's page costs the same however many jobs the others have."""
    transport = redis_world.open()
    await transport.admit(new_job("mine", tenant="few"))
    for k in range(250):
        await transport.admit(new_job(f"other-{k:03}", tenant="many"))
    assert await listed(transport, tenant="many", count=230) == [f"other-{k:03}" for k in range(249, 19, -1)]
    with redis.Redis.from_url(redis_world.server.url) as raw:

        def hashes_read() -> int:
            return raw.info("commandstats").get("cmdstat_hgetall", {}).get("calls", 0)

        before = hashes_read()
        assert await listed(transport, tenant="few") == ["mine"]
        assert hashes_read() - before == 1


async def test_a_job_reaped_while_it_is_listed_shortens_no_page(redis_world, deployment):
    transport = redis_world.open()
    for k in range(4):
        await transport.admit(new_job(f"j{k}"))
    # As if it went between the read of the list and that of the jobs.
    with redis.Redis.from_url(redis_world.server.url) as raw:
        raw.delete(f"sf:v1:{{{deployment}}}:job:j2")
    assert await listed(transport, count=3) == ["j3", "j1", "j0"]


async def test_subscribers_are_woken_and_get_events(world):
    watcher, other = world.open(), world.open()
    async with watcher.subscribe("a") as events, watcher.subscribe("b") as unrelated, watcher.subscribe("a") as second:
        await other.admit(new_job())
        assert await anext(events) is None
        await other.publish("a", b"progress")
        async with asyncio.timeout(5):
            while await anext(events) != b"progress":
                pass
            while await anext(second) != b"progress":
                pass
        await other.cancel("a")
        started = asyncio.get_running_loop().time()
        assert await anext(events) is None
        # Also without a change there is a wake-up about every second.
        assert await anext(unrelated) is None
        assert asyncio.get_running_loop().time() - started > 0.9


async def test_a_slow_subscriber_loses_the_oldest_events(transport):
    async with transport.subscribe("a") as events, transport.subscribe("a") as last:
        for k in range(300):
            await transport.publish("a", b"%d" % k)
        async with asyncio.timeout(10):
            while await anext(last) != b"299":
                pass
        assert int(await anext(events)) > 0


async def test_blobs_are_kept_under_their_hash(transport):
    data = bytes(range(256)) * 100
    sha256 = await transport.put_blob(data, keep_s=60)
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert await transport.put_blob(data, keep_s=60, admitted=True) == sha256
    assert await transport.get_blob(sha256) == data
    assert await transport.get_blob("0" * 64) is None


async def test_the_expiry_of_a_blob_is_only_moved_on(transport, eventually):
    long = await transport.put_blob(b"long", keep_s=60)
    await transport.put_blob(b"long", keep_s=0.05)
    longer = await transport.put_blob(b"longer", keep_s=0.05)
    await transport.put_blob(b"longer", keep_s=60)
    short = await transport.put_blob(b"short", keep_s=0.05)

    async def gone():
        return await transport.get_blob(short) is None

    await eventually(gone)
    assert await transport.get_blob(long) == b"long"
    assert await transport.get_blob(longer) == b"longer"


async def test_cached_values_expire_and_stay_within_their_budget(world, eventually):
    transport = world.open(policy=replace(FAST, max_cached_bytes=100))
    assert await transport.get_cached("a", keep_s=60) is None
    await transport.put_cached("a", b"a" * 40, keep_s=60)
    await transport.put_cached("b", b"b" * 40, keep_s=30)
    assert await transport.get_cached("b", keep_s=90) == b"b" * 40
    # Now a is the one that expires first, so it makes room.
    await transport.put_cached("c", b"c" * 40, keep_s=70)
    assert await transport.get_cached("a", keep_s=60) is None
    assert await transport.get_cached("b", keep_s=90) == b"b" * 40
    await transport.put_cached("short", b"s", keep_s=0.05)

    async def gone():
        await transport.reap()
        return await transport.get_cached("short", keep_s=0) is None

    await eventually(gone)
    assert await transport.get_cached("c", keep_s=70) == b"c" * 40


async def test_previews_are_capped_and_popped_once(world):
    transport = world.open(policy=replace(FAST, max_previews=3))
    assert await transport.pop_preview() is None
    for step in range(5):
        await transport.push_preview(PreviewTask(ImageRef("a", 1), step, {"latents": b"\x00\xff"}))
    popped = [await transport.pop_preview() for _ in range(4)]
    assert [task and task.step for task in popped] == [2, 3, 4, None]
    assert popped[0] == PreviewTask(ImageRef("a", 1), 2, {"latents": b"\x00\xff"})


async def test_the_registry_forgets_workers_whose_lease_lapsed(transport, eventually):
    stays = denoiser("stays", slots=4, slots_in_use=1, counters={"ticks_total": 7}, started_at_s=12.5)
    await transport.register(stays, lease_s=60)
    await transport.register(denoiser("lapses", slots=9), lease_s=0.2)
    await transport.register(denoiser("leaves", slots=1), lease_s=60)
    await transport.unregister("leaves")

    async def only_one_is_left():
        return [worker.worker_id for worker in await transport.workers()] == ["stays"]

    await eventually(only_one_is_left)
    assert await transport.workers() == [stays]
    await transport.register(replace(stays, slots_in_use=2), lease_s=60)
    assert [worker.slots_in_use for worker in await transport.workers()] == [2]


async def test_the_gpu_with_the_least_work_is_leased(transport):
    async def lease(holder, weight, gpus="abc"):
        return await transport.lease_gpu(holder, list(gpus), weight=weight, lease_s=60)

    assert [await lease(f"denoiser-{k}", 4) for k in range(3)] == ["a", "b", "c"]
    assert await lease("encoder", 0.5) == "a"
    # a has 4.5 by now.
    assert await lease("decoder-1", 2) == "b"
    assert await lease("decoder-2", 2) == "c"
    assert await lease("decoder-3", 2) == "a"
    # The order is a preference among equals, and what others have that are not asked for is nothing.
    assert await lease("fourth", 1, gpus="xcb") == "x"
    assert await lease("fifth", 1, gpus="cb") == "c"


async def test_a_holder_keeps_its_gpu(transport):
    assert await transport.lease_gpu("one", ["a", "b"], weight=4, lease_s=60) == "a"
    assert await transport.lease_gpu("two", ["a", "b"], weight=4, lease_s=60) == "b"
    assert await transport.lease_gpu("three", ["a", "b"], weight=4, lease_s=60) == "a"
    await transport.free_gpu("two")
    assert await transport.lease_gpu("three", ["a", "b"], weight=4, lease_s=60) == "a"
    # Unless that is gone.
    assert await transport.lease_gpu("three", ["b"], weight=4, lease_s=60) == "b"
    assert await transport.lease_gpu("four", ["a", "b", "c"], weight=4, lease_s=60) == "c"
    await transport.free_gpu("nobody")
    with pytest.raises(ValueError, match="gpus"):
        await transport.lease_gpu("five", [], weight=4, lease_s=60)


async def test_a_lease_on_a_gpu_lapses(transport, eventually):
    assert await transport.lease_gpu("dies", ["a", "b"], weight=4, lease_s=0.3) == "a"
    assert await transport.lease_gpu("lives", ["a", "b"], weight=1, lease_s=60) == "b"

    async def free():
        return await transport.lease_gpu("new", ["a", "b"], weight=1, lease_s=0.01) == "a"

    await eventually(free)


async def test_leases_on_gpus_are_given_one_at_a_time(world):
    gpus = [f"gpu-{k}" for k in range(4)]
    replicas = [(world.open(), f"replica-{k}") for k in range(16)]
    leased = await asyncio.gather(
        *(transport.lease_gpu(name, gpus, weight=1, lease_s=60) for transport, name in replicas)
    )
    assert sorted(leased) == sorted(4 * gpus)


@dataclass(frozen=True, slots=True)
class NewerWorkerInfo(WorkerInfo):
    """What a replica of a later version says of itself."""

    temperature_c: float = 40.0


async def test_what_nobody_of_ours_registered_is_left_out(redis_world, deployment):
    transport = redis_world.open()
    await transport.register(denoiser(slots=2), lease_s=60)
    with redis.Redis.from_url(redis_world.server.url) as client:
        for name, value in (
            ("no-lease", b"nothing"),
            ("no-json", b"9e9 {"),
            ("no-object", b"9e9 7"),
            ("no-stage", b'9e9 {"stage": "bakery", "slots": 9}'),
            ("no-fields", b'9e9 {"stage": "denoise", "slots": "many"}'),
            ("long-dead", b'1 {"stage": 3}'),
            ("no-time", b'soon {"stage": "denoise", "slots": 9, "draining": false, "worker_id": 1}'),
        ):
            client.hset(f"sf:v1:{{{deployment}}}:workers", name, value)
    assert [worker.worker_id for worker in await transport.workers()] == ["gpu"]
    await transport.admit(new_job(num_images=9))
    assert (await transport.backlog())["encode"] == 4
    await transport.reap()
    await transport.unregister("no-json")


async def test_what_a_newer_replica_says_besides_is_ignored(world):
    newer, older = world.open(), world.open()
    known = denoiser("newer", slots=3, counters={"ticks_total": 1})
    await newer.register(NewerWorkerInfo(**{name: getattr(known, name) for name in known.__slots__}), lease_s=60)
    await newer.register(denoiser("older", slots=1), lease_s=60)
    found = {worker.worker_id: worker for worker in await older.workers()}
    assert {name: getattr(found["newer"], name) for name in known.__slots__} == {
        name: getattr(known, name) for name in known.__slots__
    }
    assert found.keys() == {"newer", "older"}
    # Its slots count: the window is twice three and one.
    await older.admit(new_job(num_images=20))
    assert (await older.backlog())["encode"] == 8


async def test_what_a_newer_replica_says_of_its_slots_is_read_as_far_as_it_is_known(redis_world, deployment):
    transport = redis_world.open()
    slot = SlotView("a:0", 1, 4, 0.5, "euler")
    for name, work in (
        ("newer", [{**asdict(slot), "guidance": 3.0}]),
        ("renamed", [{"picture": "a:0"}]),
        ("another", 7),
        ("odd", ["a:0"]),
    ):
        await transport.register(denoiser(name, slots=1, work=work), lease_s=60)
    assert {worker.worker_id: worker.work for worker in await transport.workers()} == {
        "newer": (slot,),
        "renamed": (),
        "another": (),
        "odd": (),
    }


async def test_workers_that_older_replicas_registered_count_as_well(redis_world, deployment):
    transport = redis_world.open()
    await transport.register(denoiser("newer", slots=1), lease_s=60)
    await transport.register(denoiser("leaving", slots=9, draining=True), lease_s=60)
    await transport.register(denoiser("gone", slots=9), lease_s=-1)
    with redis.Redis.from_url(redis_world.server.url) as client:
        for name, draining in (("older", False), ("older-leaving", True)):
            value = f"9999999999.5 {json.dumps(asdict(denoiser(name, slots=2, draining=draining)))}"
            client.hset(f"sf:v1:{{{deployment}}}:workers", name, value)
    assert {worker.worker_id for worker in await transport.workers()} == {"newer", "leaving", "older", "older-leaving"}
    await transport.admit(new_job(num_images=20))
    assert (await transport.backlog())["encode"] == 6
    for name in ("older", "newer", "leaving"):
        await transport.unregister(name)
    assert [worker.worker_id for worker in await transport.workers()] == ["older-leaving"]


def test_what_the_scripts_read_of_a_worker_stands_first():
    text = worker_text(denoiser("gpu", slots=3))
    assert text.startswith('{"stage": "denoise", "slots": 3, "draining": false, ')
    assert worker_from(f"5.5 {text}".encode()) == (denoiser("gpu", slots=3), 5.5)


def test_a_job_without_images_is_a_mistake():
    with pytest.raises(ValueError, match="num_images"):
        new_job(num_images=0)


async def test_reading_nothing_is_a_mistake(transport):
    with pytest.raises(ValueError, match="count"):
        await transport.read(ENCODE, "w", 0)
    await transport.ping()
