"""A TCP proxy for the tests, with the faults of a network.

async with Proxy("127.0.0.1:6379") as proxy:
    client = connect_to(proxy.address)
    proxy.latency_s = 0.2
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

_PIECE_BYTES = 2**16
# Linger for 0 s: closing sends RST in place of FIN.
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Loss(Enum):
    """What becomes of a connection whose reply is lost."""

    RESET = auto()
    SILENCE = auto()


@dataclass(eq=False)
class _Link:
    """A client's connection, and ours to the target on its behalf."""

    client: asyncio.StreamWriter
    target: asyncio.StreamWriter
    silent: bool = False
    reply_is_lost: bool = False

    def close(self) -> None:
        for writer in (self.client, self.target):
            writer.close()

    def reset(self) -> None:
        for writer in (self.client, self.target):
            # It may have been closed just now.
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            writer.transport.abort()


class Proxy:
    """Passes bytes on, both ways, while its context is entered. Its faults can be switched at any time.

    Args:
        target: `host:port`.

    Attributes:
        latency_s: how long every piece waits, either way; what comes meanwhile goes with the next piece.
        lost_replies: how many replies were dropped.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self.latency_s = 0.0
        self.lost_replies = 0
        self._silent = False
        self._marker, self._to_lose, self._loss = b"", 0, Loss.RESET
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def __repr__(self) -> str:
        return f"<Proxy for {self._host}:{self._port}, {len(self._links)} connections{', silent' * self._silent}>"

    @property
    def address(self) -> str:
        assert self._server is not None, "not entered"
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def lose_replies(self, marker: bytes, *, count: int = 1, loss: Loss = Loss.RESET) -> None:
        """The next `count` requests that contain `marker` are passed on, but what is answered is not.

        For protocols in which a connection has one request under way at a time. The marker must be at the beginning
        of the request, within one piece.
        """
        self._marker, self._to_lose, self._loss = marker, count, loss

    def reset(self) -> int:
        """Breaks all connections off, with RST to both sides; returns how many."""
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    def go_silent(self) -> None:
        """Half-open: connections stay, and new ones are accepted, but whatever is sent vanishes."""
        self._silent = True
        for link in self._links:
            link.silent = True

    def speak(self) -> None:
        """Ends the silence for new connections. Those of before stay dead, and nobody is told."""
        self._silent = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name=f"proxy to {self._host}:{self._port}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            replies, target = await asyncio.open_connection(self._host, self._port)
        except OSError:
            # As the client would find it without us: nobody there.
            writer.transport.abort()
            return
        link = _Link(writer, target, silent=self._silent)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._requests(link, reader), name="requests")
                tasks.create_task(self._replies(link, replies), name="replies")
        finally:
            self._links.discard(link)
            link.close()
            for end in (link.client, link.target):
                with suppress(OSError):
                    await end.wait_closed()

    async def _requests(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                if self._to_lose and self._marker in data and not link.silent:
                    self._to_lose -= 1
                    link.reply_is_lost = True
                await self._pass_on(link, data, link.target)
        self._end(link)

    async def _replies(self, link: _Link, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                if link.reply_is_lost:
                    self._lose(link)
                await self._pass_on(link, data, link.client)
        self._end(link)

    def _lose(self, link: _Link) -> None:
        self.lost_replies += 1
        link.reply_is_lost, link.silent = False, True
        if self._loss is Loss.RESET:
            link.reset()

    async def _pass_on(self, link: _Link, data: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.latency_s)
        if not link.silent:
            writer.write(data)
            await writer.drain()

    def _end(self, link: _Link) -> None:
        # The end of one side is news for the other one, which silence keeps as well.
        if not link.silent:
            link.close()
