"""Who gets what another worker failed on, and what was handed back, over memory, Redis 6.2 and Redis 7."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from streamflow.transport.base import ImageRef
from streamflow.types import JobState
from tests.transport.worlds import ENCODE, FAST, QUIET, new_job, take


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
