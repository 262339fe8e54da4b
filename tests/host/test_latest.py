"""The mailbox for lossy news."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from streamflow.host.latest import Latest


async def read(box: Latest[int], seen: list[tuple[float, int]]) -> None:
    async for value in box:
        seen.append((time.monotonic(), value))


async def test_the_reader_gets_the_newest_and_the_last_comes_at_once() -> None:
    box: Latest[int] = Latest(interval_s=60.0)
    seen: list[tuple[float, int]] = []
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(read(box, seen), name="reader")
        box.put(1)
        while not seen:  # noqa: ASYNC110 the reader is what is under test
            await asyncio.sleep(0)
        for value in (2, 3, 4):
            box.put(value)
        box.close()
    assert [value for _, value in seen] == [1, 4]


async def test_values_come_no_more_often_than_told() -> None:
    box: Latest[int] = Latest(interval_s=0.05)
    seen: list[tuple[float, int]] = []
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(read(box, seen), name="reader")
        value = 0
        while len(seen) < 4:
            value += 1
            box.put(value)
            await asyncio.sleep(0.001)
        box.close()
    assert [value for _, value in seen] == sorted({value for _, value in seen})
    assert all(later - earlier >= 0.05 for (earlier, _), (later, _) in pairwise(seen))


async def test_a_closed_empty_mailbox_ends_its_reader() -> None:
    box: Latest[int] = Latest(interval_s=60.0)
    box.close()
    async with asyncio.timeout(10):
        assert [value async for value in box] == []
