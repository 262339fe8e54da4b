"""Mailboxes for lossy news: their readers get the newest value, not more often than told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Latest(Generic[Value]):
    """One writer, one reader.

    Args:
        interval_s: the least time between two values that the reader gets; the last one before `close` comes at once.
    """

    def __init__(self, *, interval_s: float) -> None:
        self._interval_s = interval_s
        self._waiting: list[Value] = []
        self._news = asyncio.Event()
        self._closed = asyncio.Event()

    def put(self, value: Value) -> None:
        """Replaces a value that the reader has not taken."""
        self._waiting[:] = [value]
        self._news.set()

    def close(self) -> None:
        """The reader gets what waits, and then its end."""
        self._closed.set()
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Value]:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._waiting:
                yield self._waiting.pop()
            elif self._closed.is_set():
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._closed.wait()
            if self._closed.is_set():
                self._news.set()


@contextlib.asynccontextmanager
async def passed_on(*readers: tuple[Latest[Any], Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """Runs the readers of mailboxes beside the block; they see all of it, and what it raises leaves unwrapped."""
    failure: Exception | None = None
    async with asyncio.TaskGroup() as tasks:
        for _, reader in readers:
            tasks.create_task(reader)
        try:
            yield
        except Exception as error:
            # Raised inside, it would break the readers off in the middle, and end as an ExceptionGroup.
            failure = error
        finally:
            for news, _ in readers:
                news.close()
    if failure is not None:
        raise failure
