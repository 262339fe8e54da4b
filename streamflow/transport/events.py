"""Wake-ups of jobs: bounded queues for whoever watches, and the one Redis connection that fills them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import redis.asyncio as redis
from redis.exceptions import RedisError

from streamflow.errors import UnavailableError
from streamflow.transport.redis_client import redis_errors

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
_CONFIRM_TIMEOUT_S = 5.0
_MAX_QUEUED = 256


class Mailboxes:
    """Queues of events by channel. Lossy: of a slow reader's events the oldest go first."""

    def __init__(self) -> None:
        self._queues: dict[str, set[asyncio.Queue[bytes]]] = {}

    def __contains__(self, channel: str) -> bool:
        return channel in self._queues

    def __len__(self) -> int:
        return len(self._queues)

    @contextmanager
    def open(self, channel: str) -> Iterator[asyncio.Queue[bytes]]:
        queue: asyncio.Queue[bytes] = asyncio.Queue(_MAX_QUEUED)
        self._queues.setdefault(channel, set()).add(queue)
        try:
            yield queue
        finally:
            self._queues[channel].remove(queue)
            if not self._queues[channel]:
                del self._queues[channel]

    def put(self, channel: str, event: bytes) -> None:
        for queue in self._queues.get(channel, ()):
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)


async def follow(queue: asyncio.Queue[bytes]) -> AsyncIterator[bytes | None]:
    """The events of one queue; None for an empty one, and where there was none for `LOOK_AGAIN_S`."""
    while True:
        try:
            async with asyncio.timeout(LOOK_AGAIN_S):
                event = await queue.get()
        except TimeoutError:
            yield None
        else:
            yield event or None


class RedisEvents:
    """The subscriptions of one process, however many, on one connection."""

    def __init__(self, client: redis.Redis) -> None:
        self._pubsub = client.pubsub()
        self._boxes = Mailboxes()
        self._confirmed: dict[str, asyncio.Event] = {}
        self._changing = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator[asyncio.Queue[bytes]]:
        """Once entered, every event that is published from now on is put into the queue."""
        try:
            with self._boxes.open(channel) as queue:
                await self._subscribe(channel)
                yield queue
        finally:
            # Without Redis the channel stays subscribed: its messages find no box, which costs little.
            with suppress(UnavailableError):
                await self._unsubscribe_if_unused(channel)

    async def close(self) -> None:
        while self._reader is not None and not self._reader.done():
            self._reader.cancel()
            # Again if need be: a cancellation may be forgotten, see redis_client.
            await asyncio.wait([self._reader], timeout=LOOK_AGAIN_S)
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _subscribe(self, channel: str) -> None:
        async with self._changing:
            confirmed = self._confirmed.get(channel)
            if confirmed is None:
                confirmed = self._confirmed[channel] = asyncio.Event()
                with redis_errors():
                    await self._pubsub.subscribe(channel)
            if self._reader is None:
                self._reader = asyncio.create_task(self._read(), name="redis-events")
        with redis_errors():
            async with asyncio.timeout(_CONFIRM_TIMEOUT_S):
                await confirmed.wait()

    async def _unsubscribe_if_unused(self, channel: str) -> None:
        async with self._changing:
            if channel not in self._boxes and self._confirmed.pop(channel, None) is not None:
                with redis_errors():
                    await self._pubsub.unsubscribe(channel)

    async def _read(self) -> None:
        while True:
            try:
                # redis-py subscribes again by itself when the connection was lost.
                message = await self._pubsub.get_message(timeout=LOOK_AGAIN_S)
            except (RedisError, OSError) as error:
                log.warning("no wake-ups until Redis is back: %s", error)
                await asyncio.sleep(LOOK_AGAIN_S / 2)
                continue
            if message is not None and message["channel"] is not None:
                self._deliver(message["type"], message["channel"].decode(), message["data"])

    def _deliver(self, kind: str, channel: str, data: bytes) -> None:
        if kind == "subscribe" and channel in self._confirmed:
            self._confirmed[channel].set()
        elif kind == "message":
            self._boxes.put(channel, data)
