"""API keys as a file has them at the moment: keys come and go without a restart."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from streamflow.errors import InvalidRequestError
from streamflow.rpc.auth import ApiKeys, Caller, Metadata
from streamflow.telemetry import get_logger

LOOK_EVERY_S = 1.0

_log = get_logger(__name__)

Version = tuple[int, int, int, int]
"""What changes with a file's content: when it was written and changed, its size, and which file the name stands for."""


class KeyFile:
    """Implements `auth.Keys`. While its context is entered the file is read again whenever it has changed.

    A changed file that cannot be used is told of in the log, and the keys of before stay in force: a slip of the pen
    must neither open a deployment nor shut everybody out.

    Args:
        path: None = no keys are asked for.

    Raises:
        InvalidRequestError: the file cannot be used at the start.
    """

    def __init__(self, path: Path | None, *, look_every_s: float = LOOK_EVERY_S) -> None:
        self._path, self._look_every_s = path, look_every_s
        self._keys = ApiKeys()
        self._seen: Version | tuple[()] | None = ()
        if path is not None:
            self._begin(path)
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<KeyFile of {len(self._keys.callers)} keys>"

    @property
    def on(self) -> bool:
        """See auth.Keys."""
        return self._keys.on

    def caller(self, metadata: Metadata | None) -> Caller:
        """See auth.Keys."""
        return self._keys.caller(metadata)

    def _begin(self, path: Path) -> None:
        try:
            self._seen = _version(path)
            self._keys = ApiKeys.parse(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidRequestError("api_keys_file", path, "a file of API keys", _reason(error)) from error

    async def __aenter__(self) -> Self:
        if self._path is not None:
            self._task = asyncio.create_task(self._follow(self._path), name="api keys")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _follow(self, path: Path) -> None:
        told = ""
        while True:
            await asyncio.sleep(self._look_every_s)
            try:
                # In a thread: the file may be on a network.
                await asyncio.to_thread(self._look, path)
            except (OSError, ValueError) as error:
                # What may be over in a moment is tried again, and told of once.
                if _reason(error) != told:
                    _log.error("api keys cannot be read; those of before stay in force", reason=_reason(error))
                told = _reason(error) if isinstance(error, OSError) else ""
            except Exception as error:
                _log.error("api keys cannot be read; those of before stay in force", error=error)
            else:
                told = ""

    def _look(self, path: Path) -> None:
        version = _version(path)
        if version == self._seen:
            return
        if version is None:
            self._seen = None
            raise ValueError("the file is gone")
        data = path.read_bytes()
        if _version(path) != version:
            return  # it is being written: again in a moment
        # Before it is parsed, so that one that cannot be used is told of once; after it was read, so that one that
        # could not be read for a moment is read again.
        self._seen = version
        self._keys = ApiKeys.parse(data.decode("utf-8"))
        tenants = {caller.tenant for caller in self._keys.callers.values()}
        _log.info("api keys read again", keys=len(self._keys.callers), tenants=len(tenants))


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else str(error)


def _version(path: Path) -> Version | tuple[()] | None:
    """None where there is no such file."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return None
    return about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino
