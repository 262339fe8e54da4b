"""What is special to Redis: lost groups, full memory, crashes, and what is left behind in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
import redis as redis_py

from streamflow.errors import BusyError, NotFoundError, UnavailableError
from streamflow.transport.base import ImageRef, PreviewTask
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.keys import Keys
from streamflow.transport.redis_client import redis_errors
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Failure, Stage, WorkerInfo
from tests.transport.worlds import DENOISE, ENCODE, FAST, World, new_job, redis_binary, run_through, take


@pytest.fixture
def raw(redis_world: World) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(redis_world.server.url) as client:
        yield client


@pytest.fixture(params=["6.2", "7"])
async def own_world(request: pytest.FixtureRequest, deployment: str) -> AsyncIterator[World]:
    """With a server that the test may fill, kill and start again."""
    with EmbeddedRedis(binary=redis_binary(request.param)) as server:
        world = World(deployment, server)
        yield world
        await world.close()


async def test_every_key_is_on_one_shard(redis_world, raw, deployment):
    transport = redis_world.open()
    await transport.admit(new_job(num_images=2, watch_lease_s=5, reserved_bytes=10))
    await run_through(transport, 1)
    await transport.put_blob(b"x", keep_s=60)
    await transport.put_cached("k", b"x", keep_s=60)
    names = [key.decode() for key in raw.keys(f"*{deployment}}}*")]
    assert len(names) > 8
    assert all(name.startswith(f"sf:v1:{{{deployment}}}:") for name in names)


def test_deployment_names_are_checked():
    for name in ("", "a b", "{a}", "a" * 41):
        with pytest.raises(ValueError, match="deployment"):
            Keys(name)


async def test_a_job_that_is_over_leaves_nothing(redis_world, raw, deployment, eventually):
    transport = redis_world.open(policy=replace(FAST, result_s=0.05, tombstone_s=0.1))
    await transport.register(_worker("w"), lease_s=60)
    await transport.admit(new_job("done", num_images=3, reserved_bytes=3000, watch_lease_s=5))
    await run_through(transport, 3)
    await transport.admit(new_job("cancelled", num_images=20, reserved_bytes=2000))
    await take(transport, ENCODE, count=2)
    await transport.cancel("cancelled")
    await transport.unregister("w")

    async def forgotten():
        await transport.reap()
        return await transport.jobs() == [] and not raw.exists(prefix + "tenants")

    prefix = f"sf:v1:{{{deployment}}}:"
    await eventually(forgotten)
    left = {key.decode().removeprefix(prefix) for key in raw.keys(f"*{deployment}}}*")}
    # Empty streams, because of their groups, and a few numbers.
    assert left == {"encode", "denoise", "decode", "meta"}
    assert raw.hget(prefix + "meta", "reserved") == b"0"
    assert [name for name in raw.hkeys(prefix + "meta") if name.startswith(b"reserved:")] == []
    for stage in Stage:
        assert raw.xlen(prefix + stage) == 0
        assert raw.xpending(prefix + stage, "workers")["pending"] == 0


async def test_results_expire_in_redis_itself(redis_world, raw, deployment):
    transport = redis_world.open()
    await transport.admit(new_job())
    [entry] = await take(transport, ENCODE)
    await transport.finish(entry, b"picture")
    key = f"sf:v1:{{{deployment}}}:res:a:0"
    assert 890 < raw.ttl(key) <= 900
    await transport.mark_delivered("a")
    assert 50 < raw.ttl(key) <= 60


async def test_a_lost_group_is_made_again(redis_world, raw, deployment):
    transport, other = redis_world.open(), redis_world.open()
    stream = f"sf:v1:{{{deployment}}}:encode"
    await transport.admit(new_job(num_images=2))
    [mine] = await take(transport, ENCODE)
    raw.xgroup_destroy(stream, "workers")
    assert (await transport.heartbeat(ENCODE, "w", [mine])).lost == {mine.id}
    # Nothing that is in the stream is left out, and nothing happens twice.
    entries = await take(other, ENCODE, "other", 9)
    assert sorted(entry.ref.index for entry in entries) == [0, 1]
    [same] = [entry for entry in entries if entry.ref == mine.ref]
    assert await other.finish(same, b"other")
    assert not await transport.finish(mine, b"mine")
    assert await transport.result(mine.ref) == b"other"


async def test_what_is_in_hand_is_not_given_out_again_after_a_lost_group(redis_world, raw, deployment):
    transport = redis_world.open()
    await transport.admit(new_job(num_images=2))
    [mine] = await take(transport, ENCODE)
    raw.xgroup_destroy(f"sf:v1:{{{deployment}}}:encode", "workers")
    [fresh] = await take(transport, ENCODE, count=9)
    assert fresh.ref != mine.ref
    assert await transport.heartbeat(ENCODE, "w", [mine]) == await transport.heartbeat(ENCODE, "w", [])
    assert await transport.finish(mine, b"picture")


async def test_what_is_in_hand_is_not_given_out_again_after_a_lost_answer(redis_world):
    transport, called = redis_world.open(), redis_world.open()
    await transport.admit(new_job())
    [mine] = await take(transport, ENCODE)
    # Done by Redis, but the answer does not come back to the one that called.
    assert await called.hand_back(ENCODE, "w", [mine], count_attempt=False) == 1
    assert await take(transport, ENCODE) == []
    # Repeated, it takes nothing from a next attempt.
    assert await transport.hand_back(ENCODE, "w", [mine], count_attempt=False) == 0
    [again] = await take(transport, ENCODE)
    assert (again.ref, again.attempt) == (mine.ref, 1)
    assert await transport.finish(again, b"picture")


async def test_a_group_lost_during_a_blocked_read(redis_world, raw, deployment, eventually):
    transport = redis_world.open()
    reading = asyncio.create_task(transport.read(ENCODE, "w", 1, block_s=0.5))

    async def blocked():
        return raw.info("clients")["blocked_clients"]

    await eventually(blocked)
    raw.delete(f"sf:v1:{{{deployment}}}:encode")
    assert await reading == []
    await transport.admit(new_job())
    assert len(await take(transport, ENCODE)) == 1


async def test_flushall_makes_late_work_harmless(own_world):
    transport = own_world.open()
    await transport.admit(new_job())
    [entry] = await take(transport, ENCODE)
    with redis_py.Redis.from_url(own_world.server.url) as client:
        client.flushall()
    assert not await transport.advance(entry, DENOISE, {})
    assert not await transport.finish(entry, b"late")
    with pytest.raises(NotFoundError):
        await transport.job("a")
    assert not (await transport.admit(new_job())).attached
    await run_through(transport, 1)


async def test_a_delivery_whose_reply_was_lost_is_found_again(redis_world):
    transport = redis_world.open()
    await transport.admit(new_job(num_images=2))
    await take(transport, ENCODE, "w", 1)
    # The same worker with nothing in hand: what a worker is that never saw the reply.
    entries = await take(redis_world.open(), ENCODE, "w", 9)
    # Nothing of it was begun, so it is no second attempt.
    assert [(entry.ref.index, entry.attempt) for entry in entries] == [(0, 1), (1, 1)]


async def test_what_is_given_up_is_noted(redis_world, raw, deployment):
    transport = redis_world.open(policy=replace(FAST, max_deliveries=1))
    await transport.admit(new_job())
    [entry] = await take(transport, ENCODE)
    await transport.hand_back(ENCODE, "w", [entry], count_attempt=True)
    assert await take(transport, ENCODE) == []
    [(_, note)] = raw.xrange(f"sf:v1:{{{deployment}}}:dead")
    assert (note[b"job"], note[b"stage"], note[b"attempts"]) == (b"a", b"encoder", b"1")


async def test_old_replicas_drain_while_new_ones_start(redis_world, deployment):
    old, new = (
        RedisTransport.from_url(redis_world.server.url, deployment=deployment, revision=revision, policy=FAST)
        for revision in ("r1", "r2")
    )
    await old.admit(new_job("before"))
    await new.admit(new_job("after"))
    assert ((await new.backlog())["encode"], (await new.backlog("r1"))["encode"]) == (1, 1)
    [entry] = await take(new, ENCODE, count=9)
    assert entry.ref.job_id == "after"
    assert await new.finish(entry, b"")
    assert ((await new.backlog())["encode"], (await new.backlog("r1"))["encode"]) == (0, 1)
    await run_through(old, 1)
    await new.admit(new_job("cancelled"))
    await take(new, ENCODE)
    assert await old.cancel("cancelled")
    assert (await new.backlog())["encode"] == 0
    for transport in (old, new):
        await transport.close()


async def test_consumers_go_with_their_workers_but_never_with_work(redis_world, raw, deployment):
    transport = redis_world.open()
    await transport.register(_worker("idle", ENCODE), lease_s=60)
    await transport.register(_worker("busy", ENCODE), lease_s=60)
    await transport.admit(new_job())
    await take(transport, ENCODE, "busy")
    await take(transport, ENCODE, "idle")
    for worker_id in ("idle", "busy", "unknown"):
        await transport.unregister(worker_id)
    consumers = raw.xinfo_consumers(f"sf:v1:{{{deployment}}}:encode", "workers")
    assert [consumer["name"] for consumer in consumers] == [b"busy"]


async def test_admitted_work_drains_when_memory_is_full(own_world):
    transport = own_world.open(policy=replace(FAST, min_window=2))
    await transport.register(_worker("warm"), lease_s=60)
    await transport.unregister("warm")
    first = new_job("a", num_images=6, reserved_bytes=600, watch_lease_s=60)
    await transport.admit(first)
    with redis_py.Redis.from_url(own_world.server.url) as client:
        client.config_set("maxmemory", 100_000)
        with pytest.raises(redis_py.exceptions.OutOfMemoryError):
            client.set("more", b"")
    with pytest.raises(BusyError):
        await transport.admit(new_job("b"))
    with pytest.raises(NotFoundError):
        await transport.job("b")
    for call in (transport.admit(new_job("b")), transport.look(new_job("b"))):
        with pytest.raises(BusyError) as refusal:
            await call
        assert refusal.value.reason == "full"
    with pytest.raises(BusyError):
        await transport.put_blob(b"init image", keep_s=60)
    sha256 = await transport.put_blob(b"latents", keep_s=60, admitted=True)
    await transport.put_cached("prompt", b"embeddings", keep_s=60)
    assert await transport.get_blob(sha256) == b"latents"
    assert await transport.get_cached("prompt", keep_s=60) == b"embeddings"
    assert (await transport.admit(first)).attached
    assert (await transport.look(first)).attached
    await transport.ping()
    await run_through(transport, 6)
    assert await transport.result(ImageRef("a", 5)) == b"picture"


async def test_a_move_whose_answer_was_lost_is_no_late_one(redis_world, monkeypatch):
    transport, other = redis_world.open(), redis_world.open(policy=replace(FAST, lease_s=0.05))
    await transport.admit(new_job("a", num_images=4))
    send, lost = transport._calls._execute, []

    async def lose_the_answer(*args):
        answer = await send(*args)
        lost.append(answer)
        raise redis_py.ConnectionError("reset by peer")

    moved, done, failed, stolen = await take(transport, ENCODE, count=4)
    for entry, move in (
        (moved, lambda: transport.advance(moved, DENOISE, {"latents": b"x"}, warnings=("short",))),
        (done, lambda: transport.finish(done, b"picture")),
    ):
        monkeypatch.setattr(transport._calls, "_execute", lose_the_answer)
        with pytest.raises(UnavailableError):
            await move()
        monkeypatch.undo()
        assert lost.pop() == 1
        assert await move(), entry.ref
        assert not await move(), entry.ref
    assert (await transport.job("a")).images == ("denoise", "done", "encode", "encode")
    # Whoever else had the entry is late.
    await asyncio.sleep(0.1)
    taken = {entry.id: entry for entry in await take(other, ENCODE, "another", 9)}[stolen.id]
    assert await other.finish(taken, b"another's")
    assert not await transport.finish(stolen, b"late")
    failure = Failure("INTERNAL", "broken", "encoder")
    monkeypatch.setattr(transport._calls, "_execute", lose_the_answer)
    with pytest.raises(UnavailableError):
        await transport.finish(failed, failure)
    monkeypatch.undo()
    assert await transport.finish(failed, failure)
    assert (await transport.job("a")).failure == failure


async def test_nothing_is_lost_when_redis_is_killed(own_world):
    transport = own_world.open()
    await transport.admit(new_job("a", num_images=3))
    [done, moved, taken] = await take(transport, ENCODE, count=3)
    await transport.finish(done, b"picture")
    await transport.advance(moved, DENOISE, {"latents": b"\x00"})
    async with transport.subscribe("a") as events:
        own_world.server.kill()
        with pytest.raises(UnavailableError):
            await transport.job("a")
        own_world.server.start()
        assert (await transport.job("a")).images == ("done", "denoise", "encode")
        assert await transport.result(ImageRef("a", 0)) == b"picture"
        assert await transport.finish(taken, b"picture")
        async with asyncio.timeout(15):
            event = None
            while event != b"again":
                await transport.publish("a", b"again")
                event = await anext(events)
    [entry] = await take(transport, DENOISE)
    assert dict(entry.payload) == {"latents": b"\x00"}


async def test_watchers_that_come_and_go_while_redis_is_away_meet_nothing_unexpected(own_world):
    transport = own_world.open()
    await transport.admit(new_job("a"))
    over = asyncio.Event()

    async def come_and_go(number: int) -> int:
        came = 0
        while not over.is_set():
            try:
                async with transport.subscribe(f"job-{number}"):
                    came += 1
            except UnavailableError:
                pass
            await asyncio.sleep(0.01)
        return came

    watchers = asyncio.gather(*(come_and_go(number) for number in range(30)))
    for _ in range(3):
        own_world.server.kill()
        await asyncio.sleep(0.3)
        own_world.server.start()
        await asyncio.sleep(0.3)
    over.set()
    assert all(await watchers)
    async with transport.subscribe("a") as events, asyncio.timeout(10):
        await transport.publish("a", b"still here")
        while await anext(events) != b"still here":
            pass


async def test_a_watcher_that_breaks_off_leaves_no_subscription(own_world):
    transport = own_world.open()
    with pytest.raises(RuntimeError, match="the watcher's own"):
        async with transport.subscribe("a"):
            raise RuntimeError("the watcher's own")
    with redis_py.Redis.from_url(own_world.server.url) as client:
        async with asyncio.timeout(10):
            while client.pubsub_channels():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)


async def test_more_calls_at_once_than_connections(redis_world):
    transport = redis_world.open()
    await transport.admit(new_job())
    views = await asyncio.gather(*(transport.job("a") for _ in range(250)))
    assert [view.id for view in views] == ["a"] * 250


@pytest.mark.parametrize("version", ["6.2", "7"])
async def test_what_is_not_an_image_is_put_away(version, deployment, eventually):
    with EmbeddedRedis(binary=redis_binary(version)) as server, redis_py.Redis.from_url(server.url) as raw:
        transport = RedisTransport.from_url(server.url, deployment=deployment, policy=FAST)
        stream = Keys(deployment).stream(ENCODE)
        reading = asyncio.create_task(transport.read(ENCODE, "w", 1, block_s=2))

        async def blocked():
            return raw.info("clients")["blocked_clients"]

        await eventually(blocked)
        image = {"v": 1, "job": "a", "index": 0, "deadline": 9e9, "trace": ""}
        lacking = [{name: image[name] for name in image if name != lost} for lost in image]
        for junk in (*lacking, {"x": ""}, {**image, "v": 2}, {**image, "index": "x"}, {**image, "job": "unknown"}):
            raw.xadd(stream, junk)
        await transport.admit(new_job())
        entries = await reading
        async with asyncio.timeout(10):
            while not entries:
                entries = await transport.read(ENCODE, "w", 1)
        assert await transport.finish(entries[0], b"picture")
        assert (await transport.job("a")).num_finished == 1
        assert (raw.xlen(stream), raw.xpending(stream, "workers")["pending"]) == (0, 0)
        await transport.close()


async def test_what_was_given_out_before_and_is_not_an_image_is_put_away(redis_world, raw, deployment):
    transport = redis_world.open()
    stream = Keys(deployment).stream(ENCODE)
    assert await take(transport, ENCODE) == []
    raw.xadd(stream, {"v": 1})
    raw.xreadgroup("workers", "w", {stream: ">"})
    await transport.admit(new_job())
    assert len(await take(transport, ENCODE)) == 1
    assert raw.xlen(stream) == raw.xpending(stream, "workers")["pending"] == 1


async def test_what_is_not_a_preview_is_dropped(redis_world, raw, deployment):
    transport = redis_world.open()
    for junk in ({"x": ""}, {"job": "a", "index": "x", "step": 1}):
        raw.xadd(Keys(deployment).preview, junk)
    task = PreviewTask(ImageRef("a", 0), 3, {"latents": b"\x00"})
    await transport.push_preview(task)
    assert [await transport.pop_preview() for _ in range(3)] == [None, None, task]


async def test_a_reader_holds_any_number_of_entries(redis_world):
    transport = redis_world.open(policy=replace(FAST, min_window=9000, lease_s=60))
    await transport.admit(new_job(num_images=8100))
    entries = await take(transport, ENCODE, count=8100)
    assert len(entries) == 8100
    assert await take(transport, ENCODE) == []
    assert await transport.hand_back(ENCODE, "w", entries, count_attempt=False) == 8100


async def test_cancelling_puts_down_what_is_in_hand(redis_world):
    transport = redis_world.open()
    await transport.admit(new_job(num_images=2))
    await transport.admit(new_job("b"))
    entries = await take(transport, ENCODE, count=3)
    assert "in hand: 3" in repr(transport)
    await transport.cancel("a")
    assert "in hand: 1" in repr(transport)
    assert await transport.finish(entries[2], b"picture")


async def test_an_error_is_translated_once():
    with pytest.raises(UnavailableError) as failure, redis_errors(), redis_errors():
        raise ConnectionError("refused")
    assert str(failure.value) == "Redis cannot be reached: refused"


async def test_what_cannot_be_reached_is_unavailable():
    transport = RedisTransport.from_url("redis://127.0.0.1:1/0")

    async def subscribe() -> None:
        async with transport.subscribe("a"):
            pass

    calls = (
        transport.ping(),
        transport.admit(new_job()),
        transport.jobs(),
        transport.read(ENCODE, "w", 1),
        subscribe(),
    )
    failures = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(failure) for failure in failures] == [UnavailableError] * len(calls)
    await transport.close()


def _worker(worker_id: str, stage: Stage = DENOISE) -> WorkerInfo:
    return WorkerInfo(worker_id, stage, "host:1", "shapes", "r1", "torch", "cpu", slots=1)
