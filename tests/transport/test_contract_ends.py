"""How jobs end, and how long that can be read, over memory, Redis 6.2 and Redis 7."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from streamflow.errors import NotFoundError
from streamflow.transport.base import ImageRef, Limits
from streamflow.types import Failure, JobState
from tests.transport.worlds import DENOISE, ENCODE, FAST, QUIET, denoiser, new_job, run_through, take


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


async def test_every_end_is_told_once(transport, eventually):
    for job_id in ("made", "failed", "cancelled"):
        await transport.admit(new_job(job_id))
    await run_through(transport)
    [failing, _] = await take(transport, ENCODE, count=2)
    assert await transport.finish(failing, Failure("INTERNAL", "the network gave NaN", "encoder"))
    assert not await transport.finish(failing, b"again")
    await transport.cancel("cancelled")
    await transport.cancel("cancelled")
    await transport.admit(new_job("late", timeout_s=0.1))
    assert await eventually(transport.reap) == 1
    ends = {job.id: job for job in await transport.take_ended()}
    told = {job.id: job.state.value for job in ends.values()}
    assert told == {"made": "images", "failed": "error", "cancelled": "cancelled", "late": "deadline"}
    assert 0.1 <= ends["late"].took_s < 60
    assert await transport.take_ended() == []


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


@pytest.mark.parametrize("result", [b"picture", Failure("INTERNAL", "it broke", "encoder")])
async def test_what_is_finished_after_the_deadline_came_too_late(transport, result):
    job = await transport.admit(new_job("late", timeout_s=0.05, num_images=2))
    [entry, _] = await take(transport, ENCODE, count=2)
    await asyncio.sleep(job.deadline_at_s - job.admitted_at_s + 0.01)
    assert not await transport.finish(entry, result)
    view = await transport.job("late")
    assert (view.state, view.failure.code) == (JobState.DEADLINE, "DEADLINE_EXCEEDED")
    assert view.images == ("deadline", "deadline")
    assert await transport.backlog() == QUIET
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
