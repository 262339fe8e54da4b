"""The contract of `base.Transport`, over memory, Redis 6.2 and Redis 7."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, replace

import pytest
import redis

from streamflow.errors import AlreadyExistsError, BusyError, NotFoundError
from streamflow.transport.base import Heartbeat, ImageRef, JobPlace, Limits, PreviewTask, Transport
from streamflow.types import Failure, JobState, WorkerInfo
from tests.transport.worlds import DECODE, DENOISE, ENCODE, FAST, denoiser, new_job, take

QUIET = {"waiting": 0, "encode": 0, "denoise": 0, "decode": 0}


async def listed(transport: Transport, **which) -> list[str]:
    return [view.id for view in await transport.jobs(**which)]


async def run_through(transport: Transport, worker_id: str = "w", result: bytes = b"picture") -> bool:
    """Takes the next image through all three stages."""
    [entry] = await take(transport, ENCODE, worker_id)
    assert await transport.advance(entry, DENOISE, {})
    [entry] = await take(transport, DENOISE, worker_id)
    assert await transport.advance(entry, DECODE, {})
    [entry] = await take(transport, DECODE, worker_id)
    return await transport.finish(entry, result)


# -- admission -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(BusyError):
        await transport.admit(new_job("b", reserved_bytes=80))
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


# -- order and window ------------------------------------------------------------------------------------------------


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


# -- hand-over -------------------------------------------------------------------------------------------------------


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


# -- ends ------------------------------------------------------------------------------------------------------------


async def test_a_failure_cancels_the_rest_and_keeps_what_is_done(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    await transport.admit(new_job(num_images=4, reserved_bytes=400))
    done, failing = await take(transport, ENCODE, count=2)
    await transport.finish(done, b"picture")
    [running] = await take(transport, ENCODE)
    failure = Failure("INTERNAL", "the network gave NaN", "denoiser")
    assert await transport.finish(failing, failure)
    view = await transport.job("a")
    assert (view.state, view.failure) == (JobState.ERROR, failure)
    assert view.images == ("done", "error", "cancelled", "cancelled")
    assert not await transport.advance(running, DENOISE, {})
    assert (await transport.heartbeat(ENCODE, "w", [running])).cancelled == {running.id}
    assert await transport.result(ImageRef("a", 0)) == b"picture"
    assert await transport.backlog() == QUIET


async def test_cancel_ends_a_job_once_and_frees_its_place(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    await transport.admit(new_job("a", num_images=3))
    await transport.admit(new_job("b"))
    [entry] = await take(transport, ENCODE)
    assert await transport.cancel("a")
    assert not await transport.cancel("a", state=JobState.DEADLINE)
    view = await transport.job("a")
    assert (view.state, view.images) == (JobState.CANCELLED, ("cancelled",) * 3)
    assert view.failure.code == "CANCELLED"
    assert (await transport.heartbeat(ENCODE, "w", [entry])).cancelled == {entry.id}
    assert not await transport.finish(entry, b"late")
    assert await transport.result(entry.ref) is None
    [entry] = await take(transport, ENCODE, count=9)
    assert entry.ref == ImageRef("b", 0)


async def test_unknown_jobs_are_not_found(transport):
    for call in (transport.job, transport.cancel, transport.spec, transport.queue_position):
        with pytest.raises(NotFoundError):
            await call("nobody")
    await transport.mark_delivered("nobody")
    await transport.renew_watch("nobody")
    with pytest.raises(ValueError, match="terminal"):
        await transport.cancel("nobody", state=JobState.RUNNING)


async def test_the_reaper_ends_jobs_past_their_deadline(transport, eventually):
    await transport.admit(new_job("late", timeout_s=0.05, num_images=2))
    await transport.admit(new_job("in-time"))
    assert await eventually(transport.reap) == 1
    view = await transport.job("late")
    assert (view.state, view.failure.code) == (JobState.DEADLINE, "DEADLINE_EXCEEDED")
    assert view.images == ("deadline", "deadline")
    [entry] = await take(transport, ENCODE, count=9)
    assert entry.ref.job_id == "in-time"
    assert await transport.reap() == 0


async def test_a_job_that_nobody_watches_is_cancelled(transport, eventually):
    await transport.admit(new_job("watched", watch_lease_s=0.2))
    await transport.admit(new_job("left", watch_lease_s=0.2))
    await transport.admit(new_job("detached"))

    async def left_is_cancelled():
        await transport.renew_watch("watched")
        await transport.reap()
        return (await transport.job("left")).state is JobState.CANCELLED

    await eventually(left_is_cancelled)
    assert (await transport.job("left")).failure.code == "CANCELLED"
    assert not (await transport.job("watched")).state.terminal
    assert not (await transport.job("detached")).state.terminal


async def test_watch_leases_get_a_grace_after_a_time_without_reaper(world, eventually):
    transport = world.open(policy=replace(FAST, reap_gap_s=0.1, watch_grace_s=1.0))
    await transport.admit(new_job(watch_lease_s=0.05))
    await transport.reap()
    await asyncio.sleep(0.2)
    # Nobody reaped for longer than the gap: the lease has lapsed, but its watchers may have been unable to renew.
    await transport.reap()
    assert not (await transport.job("a")).state.terminal
    started = asyncio.get_running_loop().time()

    async def cancelled():
        await transport.reap()
        return (await transport.job("a")).state is JobState.CANCELLED

    await eventually(cancelled)
    assert asyncio.get_running_loop().time() - started > 0.5


async def test_poison_ends_as_an_error_after_three_deliveries(world, eventually):
    transport = world.open()
    await transport.admit(new_job("bad", num_images=2))
    [_, neighbour] = await take(transport, ENCODE, "w", 2)
    attempts = [1]

    async def deliver_until_it_ended():
        # Each worker takes it and dies.
        await transport.heartbeat(ENCODE, "w", [neighbour])
        attempts.extend(entry.attempt for entry in await take(world.open(), ENCODE, f"w{len(attempts)}"))
        return (await transport.job("bad")).state.terminal

    await eventually(deliver_until_it_ended)
    view = await transport.job("bad")
    assert attempts == [1, 2, 3]
    assert (view.state, view.images) == (JobState.ERROR, ("error", "cancelled"))
    assert (view.failure.code, view.failure.stage) == ("INTERNAL", "encoder")
    assert "3 attempts" in view.failure.message
    assert await transport.backlog() == QUIET
    [letter] = await transport.dead_letters(tenant="")
    assert (letter.ref, letter.service, letter.attempts, letter.spec) == (ImageRef("bad", 0), "encoder", 3, b"\x00spec")
    assert letter.reason == view.failure.message
    assert letter.at_s == pytest.approx(view.finished_at_s, abs=0.1)
    assert await transport.dead_letters(tenant="another") == []
    await transport.remove_dead_letter(letter.id)
    assert await transport.dead_letters(tenant="") == []


async def test_second_deliveries_come_with_others_and_last_ones_alone(world, eventually):
    transport, other = world.open(), world.open()
    await transport.admit(new_job(num_images=3))
    assert len(await take(transport, ENCODE, "dies", 3)) == 3
    await transport.admit(new_job("fresh"))
    await transport.hand_back(ENCODE, "dies", None, count_attempt=True)
    second = await take(other, ENCODE, "dies-too", 9)
    assert [(entry.ref, entry.attempt) for entry in second] == [(ImageRef("a", index), 2) for index in range(3)]
    await transport.hand_back(ENCODE, "dies-too", None, count_attempt=True)
    last = [await take(other, ENCODE, f"other-{index}", 9) for index in range(3)]
    assert [[(entry.ref, entry.attempt) for entry in one] for one in last] == [
        [(ImageRef("a", index), 3)] for index in range(3)
    ]
    [entry] = await take(other, ENCODE, "other", 9)
    assert (entry.ref.job_id, entry.attempt) == ("fresh", 1)


async def test_suspects_in_hand_are_joined_by_suspects_only_and_last_ones_by_nobody(world):
    transport, other = world.open(), world.open()
    await transport.admit(new_job(num_images=3))
    await take(transport, ENCODE, "dies", 3)
    await transport.admit(new_job("fresh"))
    await transport.hand_back(ENCODE, "dies", None, count_attempt=True)
    [first] = await take(other, ENCODE, "other", 1)
    assert [entry.attempt for entry in await take(other, ENCODE, "other", 1)] == [2]
    assert [entry.attempt for entry in await take(other, ENCODE, "other", 9)] == [2]
    assert await take(other, ENCODE, "other", 9) == []
    # A last attempt does not come beside suspects, and nothing comes beside it.
    assert await other.hand_back(ENCODE, "other", [first], count_attempt=True) == 1
    assert await take(other, ENCODE, "other", 9) == []
    [last] = await take(transport, ENCODE, "third", 9)
    assert (last.ref, last.attempt) == (first.ref, 3)
    assert await take(transport, ENCODE, "third", 9) == []
    assert await transport.finish(last, b"picture")
    assert [entry.ref.job_id for entry in await take(transport, ENCODE, "third", 9)] == ["fresh"]


async def test_one_worker_empties_its_hands_for_a_last_attempt(world):
    transport, other = world.open(), world.open()
    await transport.admit(new_job("busy", num_images=2))
    [mine], [_] = await take(transport, ENCODE, "one"), await take(other, ENCODE, "another")
    await transport.admit(new_job("bad"))
    for _ in range(2):
        await take(transport, ENCODE, "dies")
        await transport.hand_back(ENCODE, "dies", None, count_attempt=True)
    await transport.admit(new_job("fresh", num_images=2))
    assert await take(transport, ENCODE, "one", 9) == []
    assert [entry.ref.job_id for entry in await take(other, ENCODE, "another", 1)] == ["fresh"]
    assert await take(transport, ENCODE, "one", 9) == []
    assert await transport.finish(mine, b"picture")
    [last] = await take(transport, ENCODE, "one", 9)
    assert (last.ref.job_id, last.attempt) == ("bad", 3)
    assert await transport.finish(last, b"picture")
    assert [entry.ref.job_id for entry in await take(transport, ENCODE, "one", 9)] == ["fresh"]


async def test_a_job_that_is_buried_takes_its_results_along(world):
    transport = world.open(
        policy=replace(FAST, result_s=60.0, tombstone_s=0.05), limits=Limits(max_reserved_bytes=1000)
    )
    for name in ("a", "b", "c"):
        # The next one finds room only if the last one's bytes were given back.
        await transport.admit(new_job(name, reserved_bytes=900))
        [entry] = await take(transport, ENCODE)
        assert await transport.finish(entry, b"" if name == "b" else bytes(900))
        await asyncio.sleep(0.1)
        await transport.reap()
        with pytest.raises(NotFoundError):
            await transport.job(name)
        await transport.reap()


async def test_attaching_without_a_watch_leaves_the_job_to_itself(world):
    transport = world.open(policy=replace(FAST, watch_grace_s=0.0))
    await transport.admit(new_job(watch_lease_s=0.1))
    await transport.admit(new_job("watched", watch_lease_s=0.1))
    assert (await transport.admit(new_job())).attached
    await asyncio.sleep(0.2)
    await transport.reap()
    assert (await transport.job("a")).state is JobState.RUNNING
    assert (await transport.job("watched")).state is JobState.CANCELLED


async def test_handing_back_does_not_count_and_is_claimed_at_once(world):
    transport, other = world.open(), world.open()
    await transport.admit(new_job(num_images=3))
    for _ in range(5):
        entries = await take(transport, ENCODE, "leaving", 9)
        assert [entry.attempt for entry in entries] == [1, 1, 1]
        assert await transport.hand_back(ENCODE, "leaving", entries, count_attempt=False) == 3
    assert await transport.hand_back(ENCODE, "leaving", entries, count_attempt=False) == 0
    assert len(await take(other, ENCODE, "other", 9)) == 3
    assert await transport.hand_back(ENCODE, "leaving", None, count_attempt=False) == 0


async def test_a_failed_attempt_has_a_pause_after_it(world, eventually):
    transport = world.open(policy=replace(FAST, lease_s=30.0, retry_s=0.2))
    await transport.admit(new_job())
    pauses = []
    for attempt in (1, 2, 3):
        [entry] = await take(transport, ENCODE)
        assert entry.attempt == attempt
        await transport.hand_back(ENCODE, "w", [entry], count_attempt=True)
        assert await take(transport, ENCODE) == []
        began = asyncio.get_running_loop().time()

        async def comes_again():
            entries = await take(transport, ENCODE)
            await transport.hand_back(ENCODE, "w", entries, count_attempt=False)
            return entries or (await transport.job("a")).state.terminal

        await eventually(comes_again)
        pauses.append(asyncio.get_running_loop().time() - began)
    assert pauses[0] > 0.15
    assert pauses[1] > 0.35
    assert (await transport.job("a")).state is JobState.ERROR


async def test_handing_back_everything_leaves_others_alone(world):
    transport, other = world.open(), world.open()
    await transport.admit(new_job(num_images=4))
    kept = await take(other, ENCODE, "stays", 2)
    await take(transport, ENCODE, "leaves", 2)
    assert await transport.hand_back(ENCODE, "leaves", None, count_attempt=False) == 2
    assert (await other.heartbeat(ENCODE, "stays", kept)).lost == set()
    assert len(await take(other, ENCODE, "stays", 9)) == 2


async def test_results_and_tombstones_expire(world, eventually):
    transport = world.open(policy=replace(FAST, result_s=0.2, delivered_s=0.2, tombstone_s=0.6))
    await transport.admit(new_job(reserved_bytes=50))
    await run_through(transport)

    async def gone():
        await transport.reap()
        return await transport.result(ImageRef("a", 0)) is None

    await eventually(gone)
    assert (await transport.job("a")).state is JobState.IMAGES

    async def forgotten():
        await transport.reap()
        return await transport.jobs() == []

    await eventually(forgotten)
    with pytest.raises(NotFoundError):
        await transport.job("a")


async def test_delivered_results_go_sooner(world, eventually):
    transport = world.open(policy=replace(FAST, delivered_s=0.1))
    await transport.admit(new_job("read"))
    await run_through(transport)
    await transport.admit(new_job("unread"))
    await run_through(transport)
    await transport.mark_delivered("read")
    await transport.mark_delivered("read")

    async def gone():
        await transport.reap()
        return await transport.result(ImageRef("read", 0)) is None

    await eventually(gone)
    assert await transport.result(ImageRef("unread", 0)) == b"picture"


# -- lists, wake-ups, blobs, registry --------------------------------------------------------------------------------


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


def test_a_job_without_images_is_a_mistake():
    with pytest.raises(ValueError, match="num_images"):
        new_job(num_images=0)


async def test_reading_nothing_is_a_mistake(transport):
    with pytest.raises(ValueError, match="count"):
        await transport.read(ENCODE, "w", 0)
    await transport.ping()
