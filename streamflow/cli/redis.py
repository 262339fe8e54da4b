"""The embedded Redis as a program that is kept running."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

from streamflow.transport.embedded import EmbeddedRedis


class RedisProgram:
    """Keeps its address and its data from start to start.

    Args:
        directory: for the append-only file.

    Raises:
        UnavailableError: there is no redis-server.
    """

    def __init__(self, directory: Path) -> None:
        self._server = EmbeddedRedis(directory=directory)

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def url(self) -> str:
        """Complete once it was started."""
        return self._server.url

    async def start(self) -> None:
        # Not in a worker thread: the server dies with the thread that started it.
        self._server.start()

    async def reap(self) -> str:
        self._server.kill()
        return "an error; see redis.log in its data folder"


async def answers(url: str) -> None:
    """Returns when something accepts connections there."""
    parts = urlsplit(url)
    while True:
        try:
            _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.close()
        await writer.wait_closed()
        return
