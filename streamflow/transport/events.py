"""Wake-ups of jobs: bounded queues for whoever watches, and the one Redis connection that fills them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import redis.asyncio as redis
from redis.exceptions import RedisError

from streamflow.errors import UnavailableError
from streamflow.telemetry.logs import Told
from streamflow.transport.backoff import Backoff
from streamflow.transport.redis_client import redis_errors

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
_CONFIRM_TIMEOUT_S = 5.0
_CONNECT_AGAIN_S, _CONNECT_AT_LEAST_S = 0.2, 1.0
# Without a message for so long Redis is asked whether it is still there.
_SILENCE_S = 5.0
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

    def put_everywhere(self, event: bytes) -> None:
        for channel in self._queues:
            self.put(channel, event)

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
    """The subscriptions of one process, however many, on one connection.

    One task owns the connection: it alone connects, reads, and subscribes to everything anew after a loss. Others only
    write to it while it stands. (redis-py's PubSub connects in whichever call meets the loss, and two that do so at
    once break each other.)
    """

    def __init__(self, client: redis.Redis) -> None:
        self._pool: Any = client.connection_pool
        self._boxes = Mailboxes()
        self._confirmed: dict[str, asyncio.Event] = {}
        self._connection: Any = None  # while it stands
        self._reader: asyncio.Task[None] | None = None
        self._told, self._backoff = Told(), Backoff(base_s=_CONNECT_AGAIN_S, cap_s=_CONNECT_AT_LEAST_S)

    @asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator[asyncio.Queue[bytes]]:
        """Once entered, every event that is published from now on is put into the queue.

        Raises:
            UnavailableError: Redis cannot be reached.
        """
        try:
            with self._boxes.open(channel) as queue:
                await self._subscribe(channel)
                yield queue
        finally:
            if channel not in self._boxes and self._confirmed.pop(channel, None) is not None:
                await self._send("UNSUBSCRIBE", channel)

    async def close(self) -> None:
        while self._reader is not None and not self._reader.done():
            self._reader.cancel()
            # Again if need be: a cancellation may be forgotten, see redis_client.
            await asyncio.wait([self._reader], timeout=LOOK_AGAIN_S)

    async def _subscribe(self, channel: str) -> None:
        if self._reader is None:
            self._reader = asyncio.create_task(self._run(), name="redis-events")
        confirmed = self._confirmed.get(channel)
        if confirmed is None:
            confirmed = self._confirmed[channel] = asyncio.Event()
            await self._send("SUBSCRIBE", channel)
        with redis_errors():
            async with asyncio.timeout(_CONFIRM_TIMEOUT_S):
                await confirmed.wait()

    async def _send(self, command: str, *channels: str) -> None:
        """Nothing while there is no connection: the next one begins with all channels."""
        connection = self._connection
        if connection is None or not connection.is_connected:
            return
        try:
            await connection.send_command(command, *channels, check_health=False)
        except Exception as error:
            # Of any kind, since it may be closed in the middle: its reader meets the loss too, and makes a new one.
            log.debug("not sent to Redis: %s", error)

    async def _run(self) -> None:
        while True:
            connection: Any = self._pool.make_connection()
            try:
                await connection.connect()
                await self._read(connection)
            except (RedisError, OSError) as error:
                if self._told.is_news(error):
                    log.warning("no wake-ups until Redis is back: %s", error)
            except Exception:
                log.exception("no wake-ups until there is a new connection to Redis")
            finally:
                self._connection = None
                await connection.disconnect(nowait=True)
            self._backoff.failed()
            await asyncio.sleep(self._backoff.next_s())

    async def _read(self, connection: Any) -> None:
        self._connection = connection
        if self._confirmed:
            await self._send("SUBSCRIBE", *self._confirmed)
            # What was published meanwhile is lost: everybody looks.
            self._boxes.put_everywhere(b"")
        asked = False
        while True:
            message = await connection.read_response(timeout=_SILENCE_S, disconnect_on_error=False)
            if message is not None:
                # Only now: whoever is not let in finds that out from the first answer.
                self._told.over()
                self._backoff.succeeded()
                self._deliver(*message[:3])
            elif asked:
                raise UnavailableError("Redis does not answer")
            else:
                await self._send("PING")
            asked = message is None

    def _deliver(self, kind: bytes, channel: bytes, data: object = b"") -> None:
        if kind == b"subscribe" and (confirmed := self._confirmed.get(channel.decode())):
            confirmed.set()
        elif kind == b"message" and isinstance(data, bytes):
            self._boxes.put(channel.decode(), data)
