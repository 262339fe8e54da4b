"""The contract of `base.Transport`: admission, order, hand-over, over memory, Redis 6.2 and Redis 7."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from streamflow.errors import AlreadyExistsError, BusyError, NotFoundError
from streamflow.transport.base import Heartbeat, ImageRef, Limits, blob_name
from streamflow.types import Failure, JobState
from tests.transport.worlds import DECODE, DENOISE, ENCODE, FAST, QUIET, denoiser, new_job, run_through, take


async def test_admission_is_idempotent(transport):
    first = await transport.admit(new_job(num_images=2, timeout_s=60, tenant="t"))
    again = await transport.admit(new_job(num_images=2, timeout_s=60, tenant="t"))
    assert (first.attached, again.attached) == (False, True)
    assert (again.admitted_at_s, again.deadline_at_s) == pytest.approx((first.admitted_at_s, first.deadline_at_s))
    assert first.deadline_at_s - first.admitted_at_s == pytest.approx(60, abs=1e-3)
    assert len(await take(transport, ENCODE, count=9)) == 2
    view = await transport.job("a")
    assert (view.spec, view.tenant, view.state) == (b"\x00spec", "t", JobState.RUNNING)


async def test_a_finished_job_is_attached_to_as_well(transport):
    await transport.admit(new_job())
    await run_through(transport)
    assert (await transport.admit(new_job())).attached
    assert await transport.backlog() == QUIET


async def test_the_same_id_with_another_request_is_refused(transport):
    await transport.admit(new_job())
    with pytest.raises(AlreadyExistsError):
        await transport.admit(new_job(digest="another"))
    assert len(await take(transport, ENCODE, count=9)) == 1


async def test_over_the_cap_of_jobs_is_busy_and_leaves_no_trace(world):
    transport = world.open(limits=Limits(max_jobs=1))
    await transport.admit(new_job("a"))
    with pytest.raises(BusyError) as refusal:
        await transport.admit(new_job("b"))
    assert refusal.value.retry_after_s >= 1
    with pytest.raises(NotFoundError):
        await transport.job("b")
    assert (await transport.admit(new_job("a"))).attached
    await run_through(transport)
    assert not (await transport.admit(new_job("b"))).attached


async def test_reservations_are_corrected_and_delivered_results_go_first(world):
    transport = world.open(limits=Limits(max_reserved_bytes=100))
    await transport.admit(new_job("a", reserved_bytes=80))
    # Where a tenant has no limit of its own, it is all of them that have filled it.
    with pytest.raises(BusyError) as refusal:
        await transport.admit(new_job("b", reserved_bytes=80))
    assert refusal.value.reason == "bytes"
    await run_through(transport, result=b"x" * 30)
    # 30 of 80 bytes were used, so 70 are free.
    with pytest.raises(BusyError):
        await transport.admit(new_job("b", reserved_bytes=80))
    assert await transport.result(ImageRef("a", 0)) == b"x" * 30
    await transport.mark_delivered("a")
    await transport.admit(new_job("b", reserved_bytes=80))
    assert await transport.result(ImageRef("a", 0)) is None
    await transport.cancel("b")
    await transport.admit(new_job("c", reserved_bytes=100))


async def test_results_of_a_tenant_take_no_more_than_it_may_have(world):
    transport = world.open(limits=Limits(max_reserved_bytes=1000, max_tenant_reserved_bytes=100))
    small = {"num_images": 2, "reserved_bytes": 80, "tenant": "t"}
    await transport.admit(new_job("a", **small))
    with pytest.raises(BusyError, match="results of yours") as refusal:
        await transport.admit(new_job("b", **small))
    assert (refusal.value.reason, refusal.value.retry_after_s >= 1) == ("tenant_bytes", True)
    await transport.admit(new_job("b", reserved_bytes=100, tenant="another"))
    await transport.cancel("b")
    # 20 of 80 bytes were used; what nobody fetches counts until it expires.
    await run_through(transport, 2, result=b"x" * 10)
    with pytest.raises(BusyError):
        await transport.admit(new_job("b2", reserved_bytes=81, tenant="t"))
    await transport.admit(new_job("b2", reserved_bytes=80, tenant="t"))
    await transport.cancel("b2")
    # Its own results go first once they were read, and only its own.
    await transport.mark_delivered("a")
    await transport.admit(new_job("other", tenant="another", reserved_bytes=30))
    await run_through(transport, result=b"y" * 30)
    await transport.mark_delivered("other")
    await transport.admit(new_job("c", reserved_bytes=81, tenant="t"))
    assert await transport.result(ImageRef("a", 0)) is None
    assert await transport.result(ImageRef("other", 0)) == b"y" * 30


async def test_what_a_tenant_reserved_is_given_back_however_its_jobs_end(world, eventually):
    policy = replace(FAST, max_deliveries=1, result_s=0.05, tombstone_s=0.3)
    transport = world.open(policy=policy, limits=Limits(max_tenant_reserved_bytes=100))
    full = {"num_images": 2, "reserved_bytes": 100, "tenant": "t"}

    async def admitted(job_id: str, **fields: object) -> bool:
        await transport.reap()
        try:
            return not (await transport.admit(new_job(job_id, **full, **fields))).attached
        except BusyError:
            return False

    assert await admitted("cancelled")
    assert not await admitted("one-more")
    await transport.cancel("cancelled")
    assert await admitted("failed")
    [entry, _] = await take(transport, ENCODE, count=2)
    await transport.finish(entry, Failure("INTERNAL", "broken", "encoder"))
    assert await admitted("given-up")
    await take(transport, ENCODE, "dies", 1)
    await transport.hand_back(ENCODE, "dies", None, count_attempt=True)
    await take(transport, ENCODE, "w")
    assert (await transport.job("given-up")).state is JobState.ERROR
    assert await admitted("unwatched", watch_lease_s=0.01)
    await eventually(lambda: admitted("late", timeout_s=0.01))
    await eventually(lambda: admitted("expires"))
    await run_through(transport, 2, result=b"x" * 20)
    assert not await admitted("early")
    # Not delivered, only expired.
    await eventually(lambda: admitted("last"))


async def test_a_look_says_what_admission_would_and_leaves_no_trace(world):
    transport = world.open(limits=Limits(max_jobs=2, max_tenant_jobs=1, max_reserved_bytes=100))
    new = new_job("a", tenant="t", reserved_bytes=60, watch_lease_s=5)
    assert await transport.look(new) is None
    with pytest.raises(NotFoundError):
        await transport.job("a")
    assert await transport.jobs(tenant="t") == []
    assert not (await transport.overview()).totals
    first = await transport.admit(new)
    assert not first.attached
    for fields in ({"tenant": "t"}, {"tenant": "another", "reserved_bytes": 60}):
        with pytest.raises(BusyError):
            await transport.look(new_job("b", **fields))
        with pytest.raises(NotFoundError):
            await transport.job("b")
    # The same one is attached to, whatever the limits say by now.
    again = await transport.look(new)
    assert (again.attached, again.deadline_at_s) == (True, pytest.approx(first.deadline_at_s))
    with pytest.raises(AlreadyExistsError):
        await transport.look(replace(new, digest="another"))
    totals = (await transport.overview()).totals
    assert totals == {"admitted": 1, "admitted_images": 1, "refused:tenant_jobs": 1, "refused:bytes": 1}
    assert (await transport.backlog())["encode"] == 1


async def test_images_of_a_job_are_stored_with_its_admission_alone(world):
    transport = world.open(limits=Limits(max_jobs=1), policy=replace(FAST, blob_margin_s=0.0))
    picture, other = b"picture" * 1000, b"another"
    await transport.admit(new_job("a", blobs={blob_name(picture): picture}))
    with pytest.raises(BusyError):
        await transport.admit(new_job("b", blobs={blob_name(other): other}))
    assert await transport.get_blob(blob_name(picture)) == picture
    assert await transport.get_blob(blob_name(other)) is None


async def test_priorities_order_what_waits(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    for job_id, priority in (("x", 0), ("y", 0), ("low", -1), ("normal", 0), ("high", 1)):
        await transport.admit(new_job(job_id, priority=priority))
    # The window is two: x and y are under way.
    ahead = {job_id: (await transport.queue_position(job_id)).ahead for job_id in ("x", "high", "normal", "low")}
    assert ahead == {"x": None, "high": 0, "normal": 1, "low": 2}
    order = []
    for _ in range(5):
        [entry] = await take(transport, ENCODE)
        order.append(entry.ref.job_id)
        assert await transport.finish(entry, b"")
    assert order == ["x", "y", "high", "normal", "low"]


async def test_a_near_deadline_comes_before_an_earlier_arrival(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    await transport.admit(new_job("under-way", num_images=2))
    await transport.admit(new_job("patient", timeout_s=600))
    await transport.admit(new_job("urgent", timeout_s=5))
    assert (await transport.queue_position("urgent")).ahead == 0
    assert (await transport.queue_position("patient")).ahead == 1


async def test_the_window_is_twice_the_live_slots(transport):
    await transport.register(denoiser("one", slots=1), lease_s=60)
    await transport.register(denoiser("two", slots=2), lease_s=60)
    await transport.register(denoiser("leaving", slots=50, draining=True), lease_s=60)
    await transport.admit(new_job(num_images=20))
    assert await transport.backlog() == {"waiting": 14, "encode": 6, "denoise": 0, "decode": 0}
    [entry] = await take(transport, ENCODE)
    await transport.advance(entry, DENOISE, {})
    assert (await transport.backlog())["waiting"] == 14
    [entry] = await take(transport, DENOISE)
    await transport.finish(entry, b"")
    assert await transport.backlog() == {"waiting": 13, "encode": 6, "denoise": 0, "decode": 0}
    await transport.unregister("two")
    assert len(await take(transport, ENCODE, count=20)) == 6
    assert (await transport.backlog())["waiting"] == 13


async def test_an_image_goes_through_the_stages(transport):
    await transport.admit(new_job(traceparent="00-trace", timeout_s=60))
    [entry] = await take(transport, ENCODE)
    assert (entry.ref, entry.attempt, entry.traceparent, dict(entry.payload)) == (ImageRef("a", 0), 1, "00-trace", {})
    assert 59 < entry.remaining_s <= 60
    assert await transport.spec("a") == b"\x00spec"
    payload = {"latents": bytes(range(256)), "job": b"not our own field"}
    assert await transport.advance(entry, DENOISE, payload, warnings=["cut", "cut", "slow"])
    [entry] = await take(transport, DENOISE)
    assert dict(entry.payload) == payload
    assert (await transport.job("a")).images == ("denoise",)
    assert await transport.advance(entry, DECODE, {})
    [entry] = await take(transport, DECODE)
    assert await transport.finish(entry, b"\x89PNG")
    view = await transport.job("a")
    assert (view.state, view.images, view.num_finished, view.failure) == (JobState.IMAGES, ("done",), 1, None)
    assert sorted(view.warnings) == ["cut", "slow"]
    assert view.finished_at_s >= view.admitted_at_s
    assert await transport.result(ImageRef("a", 0)) == b"\x89PNG"
    assert await transport.backlog() == QUIET


async def test_two_workers_never_get_the_same_entry(world):
    transports = [world.open() for _ in range(4)]
    await transports[0].admit(new_job(num_images=8))
    taken = await asyncio.gather(*(take(each, ENCODE, f"w{k}", 3) for k, each in enumerate(transports)))
    indices = [entry.ref.index for entries in taken for entry in entries]
    assert sorted(indices) == list(range(8))


async def test_a_blocked_read_wakes_up_for_work(world):
    reader, gateway = world.open(), world.open()
    reading = asyncio.create_task(reader.read(ENCODE, "w", 1, block_s=2))
    while not reading.done() and (await gateway.backlog())["encode"] == 0:
        await gateway.admit(new_job())
    [entry] = await reading
    assert await reader.finish(entry, b"")


async def test_a_zombie_changes_nothing(world, eventually):
    zombie, other = world.open(), world.open()
    await zombie.admit(new_job())
    [stale] = await take(zombie, ENCODE, "zombie")
    [entry] = await eventually(lambda: take(other, ENCODE, "other"))
    assert (entry.id, entry.attempt) == (stale.id, 2)
    assert await other.advance(entry, DENOISE, {"from": b"other"})
    assert not await zombie.advance(stale, DENOISE, {"from": b"zombie"}, warnings=["from the zombie"])
    assert not await zombie.finish(stale, b"zombie")
    assert not await zombie.finish(stale, Failure("INTERNAL", "zombie"))
    assert (await zombie.heartbeat(ENCODE, "zombie", [stale])).lost == {stale.id}
    [entry] = await take(other, DENOISE, "other", 9)
    assert dict(entry.payload) == {"from": b"other"}
    assert await other.finish(entry, b"picture")
    assert not await other.finish(entry, b"again")
    assert await other.result(ImageRef("a", 0)) == b"picture"
    assert (await other.job("a")).warnings == ()
    assert await other.backlog() == QUIET


async def test_heartbeats_keep_an_entry(world, eventually):
    mine, other = (world.open(policy=replace(FAST, lease_s=1.5)) for _ in range(2))
    await mine.admit(new_job(num_images=2))
    kept, lost = await take(mine, ENCODE, "mine", 2)

    async def beat_until_the_other_is_taken():
        assert await mine.heartbeat(ENCODE, "mine", [kept]) == Heartbeat()
        return await take(other, ENCODE, "other", 2)

    [taken] = await eventually(beat_until_the_other_is_taken)
    assert (taken.ref, taken.attempt) == (lost.ref, 2)
    beat = await mine.heartbeat(ENCODE, "mine", [kept, lost])
    assert (beat.lost, beat.cancelled) == ({lost.id}, set())
    assert await mine.finish(kept, b"")


async def test_own_entries_are_not_read_twice(world, eventually):
    transport, other = world.open(), world.open()
    await transport.admit(new_job())
    [entry] = await take(transport, ENCODE, "w")

    async def other_takes_it():
        # The worker asks first each time, so it would get it before the other could.
        assert await take(transport, ENCODE, "w") == []
        return await take(other, ENCODE, "other")

    [taken] = await eventually(other_takes_it)
    assert taken.id == entry.id


async def test_each_image_of_a_job_completes_once(transport):
    await transport.admit(new_job(num_images=3))
    entries = await take(transport, ENCODE, count=3)
    for entry in reversed(entries):
        assert (await transport.job("a")).state is JobState.RUNNING
        assert await transport.finish(entry, b"%d" % entry.ref.index)
        assert not await transport.finish(entry, b"again")
    assert (await transport.job("a")).state is JobState.IMAGES
    assert [await transport.result(ImageRef("a", k)) for k in range(3)] == [b"0", b"1", b"2"]
    assert await transport.result(ImageRef("a", 3)) is None
