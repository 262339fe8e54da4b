"""What a transport tells of the whole deployment, over memory, Redis 6.2 and Redis 7."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streamflow.errors import BusyError
from streamflow.transport.base import Limits, Transport
from streamflow.types import Failure, JobState, Stage
from tests.transport.worlds import FAST, World, denoiser, new_job


async def places(transport: Transport) -> dict[tuple[str, int], int]:
    return {(queue.place, queue.priority): queue.images for queue in (await transport.overview()).queues}


async def test_nothing_is_anywhere_at_first(transport: Transport) -> None:
    overview = await transport.overview()
    assert (overview.queues, overview.dead_letters) == ((), 0)
    assert not overview.totals


async def test_images_are_told_by_place_and_priority_with_the_age_of_the_oldest(world: World) -> None:
    transport = world.open()
    # Two slots: a window of four images, of which the first two are taken on to the denoiser.
    await transport.register(denoiser(slots=2), lease_s=60)
    await transport.admit(new_job("low", num_images=6, priority=-1))
    for entry in await transport.read(Stage.ENCODE, "e", 2):
        await transport.advance(entry, Stage.DENOISE, {"text": b"x" * 1000})
    await transport.admit(new_job("high", num_images=3, priority=1))
    assert await places(transport) == {("waiting", -1): 2, ("waiting", 1): 3, ("encode", -1): 2, ("denoise", -1): 2}
    assert all(0 <= queue.oldest_s < 30 for queue in (await transport.overview()).queues)
    await transport.cancel("low")
    assert await places(transport) == {("encode", 1): 3}


async def test_everything_is_counted_once(world: World) -> None:
    transport = world.open(policy=replace(FAST, max_deliveries=2), limits=Limits(max_jobs=3))
    await transport.register(denoiser(slots=8), lease_s=60)
    for name, images in (("a", 2), ("b", 1), ("c", 1)):
        await transport.admit(new_job(name, num_images=images, nonce=name))
    await transport.admit(new_job("a", num_images=2, nonce="a"))
    with pytest.raises(BusyError):
        await transport.admit(new_job("d"))
    entries = {str(entry.ref): entry for entry in await transport.read(Stage.ENCODE, "e", 8)}
    for _ in range(2):
        await transport.finish(entries["a:0"], b"picture")
        await transport.finish(entries["a:1"], b"picture")
        await transport.finish(entries["b:0"], Failure("INTERNAL", "broken", "encoder"))
    await transport.hand_back(Stage.ENCODE, "e", [entries["c:0"]], count_attempt=True)
    assert (await transport.overview()).totals == {
        "admitted": 3,
        "admitted_images": 4,
        "refused:jobs": 1,
        "images:done": 2,
        "ended:images": 1,
        "images:error": 1,
        "ended:error": 1,
    }


async def test_what_is_taken_again_and_given_up_is_counted(world: World, eventually) -> None:
    transport = world.open(policy=replace(FAST, max_deliveries=2))
    await transport.admit(new_job("a"))

    async def given_up() -> bool:
        for entry in await transport.read(Stage.ENCODE, "e", 1, block_s=0):
            await transport.hand_back(Stage.ENCODE, "e", [entry], count_attempt=True)
        return (await transport.job("a")).state is JobState.ERROR

    await eventually(given_up)
    overview = await transport.overview()
    told = {name: total for name, total in overview.totals.items() if name.startswith(("redelivered", "given_up"))}
    assert (told, overview.dead_letters) == ({"redelivered:encode": 1, "given_up:encode": 1}, 1)


async def test_what_was_handed_back_for_no_fault_is_not_counted_as_taken_over(world: World, eventually) -> None:
    transport, other = world.open(), world.open()
    await transport.admit(new_job("a", num_images=3))

    async def redelivered() -> int:
        return (await transport.overview()).totals.get("redelivered:encode", 0)

    # As in a drain, and when Redis is away for a moment.
    for worker in ("leaves", "leaves-too"):
        entries = await transport.read(Stage.ENCODE, worker, 3, block_s=0)
        await transport.hand_back(Stage.ENCODE, worker, entries, count_attempt=False)
    assert len(await transport.read(Stage.ENCODE, "dies", 3, block_s=0)) == 3
    assert await redelivered() == 0
    # Nobody beats for them.
    await eventually(lambda: other.read(Stage.ENCODE, "other", 3, block_s=0))
    assert await redelivered() == 3
    # What failed before is not counted once more for being handed back.
    await other.hand_back(Stage.ENCODE, "other", None, count_attempt=False)
    assert len(await transport.read(Stage.ENCODE, "third", 3, block_s=0)) == 3
    assert await redelivered() == 3
