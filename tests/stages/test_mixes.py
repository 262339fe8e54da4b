"""Images wait while as many other variants are under way as are kept."""

from __future__ import annotations

import asyncio

from streamflow.stages.mixes import Mixes, fits
from streamflow.types import PLAIN, AdapterUse, Variant

INK, WASH, OIL = (Variant((AdapterUse(name),)) for name in ("ink", "wash", "oil"))


def test_what_is_plain_or_under_way_always_fits() -> None:
    assert fits(PLAIN, [INK, WASH], most=2)
    assert fits(INK, [INK, WASH, PLAIN], most=2)
    assert not fits(OIL, [INK, INK, WASH], most=2)
    assert fits(OIL, [INK, PLAIN], most=2)
    assert not fits(OIL, [], most=0)


async def test_one_more_waits_for_the_last_image_of_another() -> None:
    mixes, order = Mixes(2), asyncio.Queue[str]()
    release = {name: asyncio.Event() for name in ("ink", "ink again", "wash")}

    async def run(name: str, variant: Variant) -> None:
        async with mixes.held(variant):
            order.put_nowait(name)
            if name in release:
                await release[name].wait()

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for name, variant in (("ink", INK), ("wash", WASH), ("ink again", INK), ("oil", OIL), ("plain", PLAIN)):
            tasks.create_task(run(name, variant))
        assert [await order.get() for _ in range(4)] == ["ink", "wash", "ink again", "plain"]
        release["ink"].set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert order.empty(), "ink is still under way"
        release["ink again"].set()
        assert await order.get() == "oil"
        release["wash"].set()


async def test_what_waits_is_told_of_and_may_leave() -> None:
    mixes, told = Mixes(1), asyncio.Event()

    async def wait() -> None:
        async with mixes.held(WASH, on_wait=told.set):
            raise AssertionError("it was let in")

    async with mixes.held(INK):
        waiting = asyncio.create_task(wait())
        async with asyncio.timeout(20):
            await told.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
    async with asyncio.timeout(20), mixes.held(WASH):
        pass
