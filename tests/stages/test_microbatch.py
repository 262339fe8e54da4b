"""Grouping, waiting, failing alone and ending, shown with a batch function that records its calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from streamflow.errors import UnavailableError
from streamflow.stages import microbatch
from streamflow.stages.microbatch import MicroBatcher

LONG_S = 60.0
"""A wait that no test may live through: what ends sooner did not wait."""


class Recorder:
    """Doubles numbers; refuses 13; can be held up until `gate` is set."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.calls.append(list(items))
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(LONG_S)
        if 13 in items:
            raise ValueError("13 is not for doubling")
        return [2 * item for item in items]


def tens(item: int) -> int:
    return item // 10


async def until_waiting(batcher: MicroBatcher[int, int], count: int) -> None:
    while batcher.waiting < count:  # noqa: ASYNC110 the batcher has no event for this, and needs none
        await asyncio.sleep(0)


async def test_a_full_group_runs_at_once_in_one_call_and_one_foreign_thread() -> None:
    record = Recorder()
    async with MicroBatcher(record, key=tens, max_rows=3, max_wait_s=LONG_S) as batcher:
        assert await asyncio.gather(*map(batcher.submit, [1, 2, 3])) == [2, 4, 6]
        assert await asyncio.gather(*map(batcher.submit, [4, 5, 6])) == [8, 10, 12]
        assert (batcher.calls, batcher.rows) == (2, 6)
    assert record.calls == [[1, 2, 3], [4, 5, 6]]
    assert len(record.threads) == 1
    assert threading.get_ident() not in record.threads


async def test_items_of_different_keys_never_share_a_call() -> None:
    record = Recorder()
    async with MicroBatcher(record, key=tens, max_rows=2, max_wait_s=LONG_S) as batcher:
        assert await asyncio.gather(*map(batcher.submit, [1, 21, 2, 22])) == [2, 42, 4, 44]
    assert record.calls == [[1, 2], [21, 22]]


async def test_a_lone_item_waits_no_longer_than_told() -> None:
    async with MicroBatcher(Recorder(), key=tens, max_rows=8, max_wait_s=0.05) as batcher:
        started = time.monotonic()
        assert await batcher.submit(4) == 8
        assert time.monotonic() - started >= 0.05


async def test_what_comes_while_a_call_runs_goes_into_the_next_one() -> None:
    record = Recorder()
    record.gate.clear()
    async with MicroBatcher(record, key=tens, max_rows=3, max_wait_s=0.0) as batcher, asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.submit(1))
        await asyncio.to_thread(record.entered.wait)
        for item in (2, 3, 4, 5):
            tasks.create_task(batcher.submit(item))
        await until_waiting(batcher, 4)
        record.gate.set()
    assert record.calls == [[1], [2, 3, 4], [5]]


async def test_only_the_guilty_item_fails() -> None:
    record = Recorder()
    async with MicroBatcher(record, key=tens, max_rows=3, max_wait_s=LONG_S) as batcher:
        results = await asyncio.gather(*map(batcher.submit, [12, 13, 14]), return_exceptions=True)
    assert results[0] == 24
    assert isinstance(results[1], ValueError)
    assert results[2] == 28
    assert record.calls == [[12, 13, 14], [12], [13], [14]]


async def test_a_batch_function_that_loses_results_is_found_out() -> None:
    async with MicroBatcher(lambda items: list(items)[1:], key=tens, max_rows=1) as batcher:
        with pytest.raises(RuntimeError, match="0 results for 1 items"):
            await batcher.submit(1)


async def test_a_cancelled_item_is_withdrawn_and_its_neighbours_run() -> None:
    record = Recorder()
    async with MicroBatcher(record, key=tens, max_rows=2, max_wait_s=LONG_S) as batcher:
        withdrawn = asyncio.ensure_future(batcher.submit(1))
        await until_waiting(batcher, 1)
        withdrawn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await withdrawn
        assert await batcher.submit(2) == 4
    assert record.calls == [[2]]


async def test_closing_runs_what_waits_without_delay_and_refuses_more() -> None:
    batcher = MicroBatcher(Recorder(), key=tens, max_rows=8, max_wait_s=LONG_S)
    waiting = [asyncio.ensure_future(batcher.submit(item)) for item in (1, 25)]
    await until_waiting(batcher, 2)
    await asyncio.to_thread(batcher.close)
    assert await asyncio.gather(*waiting) == [2, 50]
    with pytest.raises(RuntimeError, match="after close"):
        await batcher.submit(3)


async def test_a_busy_key_does_not_starve_another() -> None:
    record = Recorder()
    record.gate.clear()
    async with MicroBatcher(record, key=tens, max_rows=1, max_wait_s=0.0) as batcher, asyncio.TaskGroup() as tasks:
        for item in (1, 2, 91, 3, 4):
            tasks.create_task(batcher.submit(item))
        await until_waiting(batcher, 4)
        record.gate.set()
    assert record.calls == [[1], [2], [91], [3], [4]]


async def test_a_call_that_hangs_is_told_and_leaves_its_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbatch, "_JOIN_S", 0.2)
    record = Recorder()
    async with MicroBatcher(record, key=tens, max_rows=1, max_wait_s=0, name="decoder") as batcher:
        watch = asyncio.create_task(batcher.watch(hung_after_s=0.2))
        assert await batcher.submit(1) == 2
        await asyncio.sleep(0.5)
        assert not watch.done(), "an idle thread does not hang"
        record.gate.clear()
        hung = asyncio.create_task(batcher.submit(2))
        with pytest.raises(UnavailableError, match=r"decoder's network call has not ended after 0\.2 s"):
            await watch
    # Leaving did not wait for the thread.
    assert not hung.done()
    record.gate.set()
    assert await hung == 4


def test_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="max_rows: got 0"):
        MicroBatcher(Recorder(), key=tens, max_rows=0)
