"""Who is let in, in which order, and what is promised: estimates, deadlines, fairness and rates."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from streamflow.errors import BusyError, DeadlineError, NotFoundError
from streamflow.transport.base import Limits, Transport
from streamflow.types import Quota, Stage
from tests.transport.worlds import ENCODE, FAST, denoiser, new_job, take


async def finish_next(transport: Transport, *, after_s: float = 0.0) -> str:
    """Takes the next image, works on it so long and finishes it; its job."""
    [entry] = await take(transport, ENCODE)
    await asyncio.sleep(after_s)
    assert await transport.finish(entry, b"")
    return entry.ref.job_id


async def released_order(transport: Transport, count: int) -> list[str]:
    return [await finish_next(transport) for _ in range(count)]


async def test_the_estimate_follows_the_measured_rate(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    await transport.admit(new_job(num_images=8))
    assert (await transport.queue_position("a")).estimate_s is None
    assert (await transport.job("a")).estimate_s is None
    for _ in range(3):
        await finish_next(transport, after_s=0.05)
    position = await transport.queue_position("a")
    assert position.ahead == 0
    # Five images are left.
    assert 0.2 < position.estimate_s < 5
    await transport.admit(new_job("behind"))
    assert (await transport.queue_position("behind")).estimate_s > position.estimate_s / 2
    assert (await transport.job("behind")).estimate_s > 0.15


async def test_estimates_go_by_the_work(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    for k in range(6):
        work = (1.0, 4.0)[k % 2]
        await transport.admit(new_job(f"measured-{k}", work=work))
        await finish_next(transport, after_s=0.02 * work)
    expected = []
    for work in (1.0, 4.0, 40.0):
        await transport.admit(new_job(f"asked-{work}", work=work))
        expected.append((await transport.job(f"asked-{work}")).estimate_s)
        await transport.cancel(f"asked-{work}")
    assert expected[0] < expected[1] < expected[2]
    assert expected[2] > 0.5
    assert await transport.expected_s([1.0, 4.0, 40.0], num_images=1) == pytest.approx(expected, rel=0.01)


async def test_what_cannot_end_in_time_is_refused_at_once(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    for k in range(3):
        await transport.admit(new_job(f"measured-{k}", work=2.0))
        await finish_next(transport, after_s=0.1)
    with pytest.raises(DeadlineError, match=r"takes about \d+ s here, too much for the 2 s"):
        await transport.admit(new_job("long", work=400.0, timeout_s=2.0))
    with pytest.raises(NotFoundError):
        await transport.job("long")
    # Alone each ends in time, but not behind so many others.
    admitted = 0
    refusal = None
    while refusal is None:
        try:
            await transport.admit(new_job(f"short-{admitted}", work=2.0, timeout_s=5.0))
            admitted += 1
        except BusyError as error:
            refusal = error
    assert "deadline would pass first" in str(refusal)
    assert 5 < admitted < 100
    assert refusal.retry_after_s >= 1
    await transport.admit(new_job("patient", work=2.0, timeout_s=600))


async def test_what_a_crowd_took_is_not_held_against_an_idle_server(transport):
    await transport.register(denoiser(slots=4), lease_s=60)
    await transport.admit(new_job("crowd", num_images=8))
    for _ in range(8):
        await finish_next(transport, after_s=0.05)
    await transport.admit(new_job("alone", timeout_s=0.19))
    assert (await transport.job("alone")).estimate_s < 0.15
    # Among as many others it is what it was.
    [crowded] = await transport.expected_s([1.0], num_images=7)
    assert crowded > 0.15


async def register_all(transport: Transport) -> None:
    for stage in Stage:
        await transport.register(replace(denoiser(stage, slots=4), stage=stage), lease_s=60)


@pytest.mark.parametrize("missing", Stage)
async def test_waiting_for_a_stage_without_replicas_is_not_held_against_those_that_follow(world, missing):
    transport = world.open(policy=replace(FAST, lease_s=30.0))
    await register_all(transport)
    await transport.unregister(missing)
    await transport.admit(new_job("waits", timeout_s=20.0))
    await transport.admit(new_job("waits in vain", timeout_s=0.2))
    await asyncio.sleep(0.25)
    await transport.reap()
    await register_all(transport)
    await finish_next(transport)
    assert await transport.expected_s([1.0], num_images=1) == [None]
    # With all of them there, what comes next is measured again.
    await transport.reap()
    await transport.admit(new_job("goes"))
    await finish_next(transport, after_s=0.02)
    [expected_s] = await transport.expected_s([1.0], num_images=1)
    assert 0.02 <= expected_s < 0.2


async def test_what_never_ends_in_time_is_learned_from(world):
    transport = world.open(policy=replace(FAST, lease_s=30.0))
    await register_all(transport)
    await transport.admit(new_job("hurried", timeout_s=0.2))
    await take(transport, ENCODE)
    await asyncio.sleep(0.25)
    await transport.reap()
    with pytest.raises(DeadlineError, match="takes about"):
        await transport.admit(new_job("hurried again", timeout_s=0.2))
    await transport.admit(new_job("patient", timeout_s=2.0))


async def test_old_measurements_refuse_nobody(world):
    transport = world.open(policy=replace(FAST, fresh_s=0.0))
    await transport.admit(new_job("measured"))
    await finish_next(transport, after_s=0.1)
    await transport.admit(new_job("long", work=1e6, timeout_s=1.0))
    assert (await transport.job("long")).estimate_s > 1.0
    assert await transport.expected_s([1.0], num_images=1) == [None]


async def test_a_tenant_that_asks_for_little_does_not_wait_for_one_that_asks_for_much(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    await transport.admit(new_job("first", num_images=2, tenant="greedy"))
    for k in range(4):
        await transport.admit(new_job(f"much-{k}", num_images=5, tenant="greedy"))
    await transport.admit(new_job("little", num_images=2, tenant="modest"))
    order = await released_order(transport, 24)
    assert order[:2] == ["first", "first"]
    assert all(job != "little" for job in order[12:])
    # Its own requests stay in the order in which they came.
    greedy = [job for job in order if job.startswith("much")]
    assert greedy == sorted(greedy)


async def test_tenants_that_both_ask_for_much_take_turns(transport):
    await transport.register(denoiser(slots=1), lease_s=60)
    await transport.admit(new_job("first", num_images=2))
    await transport.admit(new_job("a", num_images=10, tenant="a"))
    await transport.admit(new_job("b", num_images=10, tenant="b"))
    # One's images are dearer, so it gets fewer of them.
    await transport.admit(new_job("c", num_images=10, tenant="c", work=5.0))
    order = (await released_order(transport, 32))[2:14]
    assert 4 <= order.count("a") <= 7
    assert 4 <= order.count("b") <= 7
    assert 1 <= order.count("c") <= 3


async def test_idle_capacity_is_not_held_against_whoever_used_it(transport):
    await transport.register(denoiser(slots=4), lease_s=60)
    await transport.admit(new_job("alone", num_images=8, tenant="a", work=100.0))
    await released_order(transport, 8)
    await transport.admit(new_job("first", num_images=8, tenant="b"))
    await transport.admit(new_job("a", tenant="a"))
    await transport.admit(new_job("b", tenant="b"))
    assert (await released_order(transport, 10))[8:] == ["a", "b"]


async def test_a_tenant_gets_so_many_images_in_a_minute(world):
    transport = world.open(limits=Limits(tenant_images_per_minute=10))
    await transport.admit(new_job("a", num_images=6, tenant="t"))
    with pytest.raises(BusyError, match="more images than you may have in a minute") as refusal:
        await transport.admit(new_job("b", num_images=6, tenant="t"))
    # Two too many: a fifth of a minute.
    assert refusal.value.retry_after_s == pytest.approx(12, abs=2)
    await transport.admit(new_job("b", num_images=4, tenant="t"))
    with pytest.raises(BusyError):
        await transport.admit(new_job("c", tenant="t"))
    assert (await transport.admit(new_job("a", num_images=6, tenant="t"))).attached
    await transport.admit(new_job("c", num_images=10, tenant="another"))


async def test_a_tenant_may_have_so_many_jobs_at_once(world):
    transport = world.open(limits=Limits(max_tenant_jobs=2))
    for job_id in ("a", "b"):
        await transport.admit(new_job(job_id, tenant="t"))
    with pytest.raises(BusyError, match="jobs of yours"):
        await transport.admit(new_job("c", tenant="t"))
    await transport.admit(new_job("c", tenant="another"))
    await transport.cancel("a")
    await transport.admit(new_job("d", tenant="t"))
    await finish_next(transport)
    await transport.admit(new_job("e", tenant="t"))
    with pytest.raises(BusyError):
        await transport.admit(new_job("f", tenant="t"))


async def test_a_tenant_may_have_a_quota_of_its_own(world):
    transport = world.open(limits=Limits(max_tenant_jobs=1, tenant_images_per_minute=10))
    generous, strict = Quota(jobs=2, images_per_minute=20), Quota(images_per_minute=4)
    for job_id in ("a", "b"):
        await transport.admit(new_job(job_id, num_images=8, tenant="t", quota=generous))
    with pytest.raises(BusyError, match="jobs of yours"):
        await transport.admit(new_job("c", tenant="t", quota=generous))
    with pytest.raises(BusyError, match="in a minute"):
        await transport.admit(new_job("d", num_images=5, tenant="strict", quota=strict))
    await transport.admit(new_job("d", num_images=4, tenant="strict", quota=strict))
    with pytest.raises(BusyError, match="jobs of yours"):
        await transport.admit(new_job("e", tenant="strict", quota=strict))
    # 0 = no limit of its own.
    free = Quota(jobs=0, images_per_minute=0)
    for job_id in ("f", "g", "h"):
        await transport.admit(new_job(job_id, num_images=50, tenant="free", quota=free))


async def test_a_call_whose_answer_was_lost_is_not_taken_for_somebody_elses(transport):
    assert not (await transport.admit(new_job(nonce="first"))).attached
    assert not (await transport.admit(new_job(nonce="first"))).attached
    assert (await transport.admit(new_job(nonce="second"))).attached
    assert (await transport.admit(new_job())).attached
    assert (await transport.backlog())["encode"] == 1


async def test_clocks_of_the_past_are_forgotten(redis_world, deployment):
    transport = redis_world.open(limits=Limits(tenant_images_per_minute=6000))
    for k in range(3):
        await transport.admit(new_job(f"job-{k}", tenant=f"tenant-{k}", work=0.001))
        await finish_next(transport)
    await asyncio.sleep(0.1)
    await transport.reap()
    assert not await transport._calls.command("HGETALL", f"sf:v1:{{{deployment}}}:tenants")


def test_work_must_be_a_number_that_can_be_added():
    for work in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="work"):
            new_job(work=work)
