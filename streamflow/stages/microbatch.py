"""Micro-batching: concurrent submissions become calls of a blocking function over a few items at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import inf
from typing import Generic, Self, TypeVar

from streamflow.errors import UnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")

_JOIN_S = 2.0
_LOOK_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Pending(Generic[Item, Result]):
    item: Item
    due_s: float
    future: Future[Result]


class MicroBatcher(Generic[Item, Result]):
    """Runs a blocking batch function in one thread of its own.

    A call takes waiting items of one key: as soon as there are `max_rows` of them, or when the oldest has waited for
    `max_wait_s`. A call that raises is repeated item by item, so that only the guilty item fails.

    Args:
        run: one result per item, in order; all items have the same key. Called in the thread only.
        key: what items must have in common to share a call.
        max_rows: items in one call; 1 switches batching off.
        max_wait_s: how long an item waits for company.
        name: of the thread.

    Attributes:
        calls, rows: calls that succeeded, and the items in them.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        key: Callable[[Item], Hashable],
        max_rows: int,
        max_wait_s: float = 0.004,
        name: str = "microbatch",
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: got {max_rows}, allowed: 1 or more")
        self._run, self._key, self._max_rows, self._max_wait_s = run, key, max_rows, max_wait_s
        self._groups: dict[Hashable, list[_Pending[Item, Result]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._call_began_s: float | None = None
        self.calls, self.rows = 0, 0
        # A daemon: an interpreter that ends without close() must not hang on a network call.
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        return f"MicroBatcher({self.waiting} waiting, {self.calls} calls, {self.rows} rows)"

    @property
    def waiting(self) -> int:
        """Items that no call has taken yet."""
        with self._changed:
            return sum(len(group) for group in self._groups.values())

    async def submit(self, item: Item) -> Result:
        """The item's result; cancelling the caller withdraws an item that no call has taken yet.

        Raises:
            RuntimeError: the batcher is closed.
            Exception: whatever the batch function raises for this item alone.
        """
        future: Future[Result] = Future()
        key, due_s = self._key(item), time.monotonic() + self._max_wait_s
        with self._changed:
            if self._closed:
                raise RuntimeError("submit() after close()")
            if not self._thread.ident:
                self._thread.start()
            self._groups.setdefault(key, []).append(_Pending(item, due_s, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Takes no more items, runs those that wait without further delay, and ends the thread.

        Blocks until then, but not for long: a thread that hangs in a network call goes with its process.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident:
            self._thread.join(_JOIN_S)

    async def watch(self, *, hung_after_s: float = inf) -> None:
        """Returns never; a process whose thread hangs should end, so that it is started anew.

        Args:
            hung_after_s: what a call may take.

        Raises:
            UnavailableError: a call has taken longer.
        """
        hangs = False
        while not hangs:
            await asyncio.sleep(min(_LOOK_S, hung_after_s / 4))
            # The thread's own; it may be set anew at any time.
            began_s = self._call_began_s
            hangs = began_s is not None and time.monotonic() - began_s > hung_after_s
        name = self._thread.name
        raise UnavailableError(f"the {name}'s network call has not ended after {hung_after_s:g} s; restart the {name}")

    def _loop(self) -> None:
        while True:
            batch = self._take()
            if batch is None:
                return
            running = [pending for pending in batch if pending.future.set_running_or_notify_cancel()]
            if running:
                self._execute(running)
                self._call_began_s = None

    def _take(self) -> list[_Pending[Item, Result]] | None:
        """Blocks for the next batch; None once closed and empty."""
        with self._changed:
            while self._groups or not self._closed:
                # Oldest first even among full groups, or one busy key would starve the others.
                groups = sorted(self._groups.items(), key=lambda entry: entry[1][0].due_s)
                ready = next((key for key, group in groups if self._ready(group)), None)
                if ready is not None:
                    return self._cut(ready)
                self._changed.wait(groups[0][1][0].due_s - time.monotonic() if groups else None)
            return None

    def _ready(self, group: Sequence[_Pending[Item, Result]]) -> bool:
        return self._closed or len(group) >= self._max_rows or group[0].due_s <= time.monotonic()

    def _cut(self, key: Hashable) -> list[_Pending[Item, Result]]:
        group = self._groups.pop(key)
        if len(group) > self._max_rows:
            self._groups[key] = group[self._max_rows :]
        return group[: self._max_rows]

    def _execute(self, batch: Sequence[_Pending[Item, Result]]) -> None:
        self._call_began_s = time.monotonic()
        try:
            results = self._run([pending.item for pending in batch])
            self.calls += 1
            self.rows += len(batch)
            if len(results) != len(batch):
                raise RuntimeError(f"the batch function gave {len(results)} results for {len(batch)} items")
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            _log.warning("a batch of %d failed (%s); its items run one by one", len(batch), type(error).__name__)
            for pending in batch:
                self._execute([pending])
        else:
            for pending, result in zip(batch, results, strict=True):
                pending.future.set_result(result)
