"""How we talk to Redis: connections, scripts by their hash, and errors in our own words."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    InvalidResponse,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from streamflow.errors import BusyError, StreamFlowError, UnavailableError
from streamflow.transport.keys import Keys
from streamflow.transport.policy import Policy
from streamflow.transport.redis_access import RedisAccess

Argument = str | bytes | int | float

SOCKET_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 64
CONNECTION_WAIT_S = 20.0
# Answers of a Redis that is there but cannot take writes now: it loads its data, its disk is full, it is a replica,
# or becomes one during a blocked read.
_NOT_NOW = ("LOADING", "UNBLOCKED", "MISCONF", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS", "TRYAGAIN")

# Of a connection whose server and client no longer agree, or to which no user was let in: Redis hangs up after that.
_BROKEN = "Protocol error"

# Of a user without the right, outside of a script and inside of one (which Redis 7 puts into other words).
_NOT_ALLOWED = ("NOPERM", "no permissions", "user executing the script")


def connect(access: RedisAccess | str) -> redis.Redis:
    """A client with a pool of connections. Every command is sent up to 4 times within about a second.

    More calls at once than there are connections wait for one: each call is short, or blocks for 2 s at most.

    Args:
        access: a string is a URL.

    Raises:
        InvalidRequestError: see `RedisAccess.check`.
    """
    access = RedisAccess(access) if isinstance(access, str) else access
    access.check()
    url, options = access.connection_options()
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=CONNECTION_WAIT_S,
        protocol=2,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=2.0,
        health_check_interval=15,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
        # Not CLIENT SETINFO at every connection, which takes a right that Redis 7.0 cannot even name.
        driver_info=None,
        **options,
    )
    return redis.Redis.from_pool(pool)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turns errors of Redis into UnavailableError and, when its memory is full, BusyError."""
    with _cancellation_kept(), _translated():
        yield


@contextmanager
def _cancellation_kept() -> Iterator[None]:
    # redis-py sends with asyncio.wait_for, which in Python 3.11 forgets a cancellation that comes as the send ends.
    task = asyncio.current_task()
    assert task is not None, "only for coroutines"
    before = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except StreamFlowError:
        raise  # UnavailableError is an OSError as well
    except (RedisConnectionError, RedisTimeoutError, InvalidResponse, OSError) as error:
        raise _away(f"Redis cannot be reached: {error}") from error
    except ResponseError as error:
        # Redis 6.2 hides the kind of an error inside a script in its text.
        if isinstance(error, OutOfMemoryError) or "-OOM" in str(error):
            message = "the store is full; try again when results have been delivered"
            raise BusyError(message, reason="full") from error
        if str(error).startswith(_BROKEN):
            raise _away(f"Redis broke the connection off: {error}") from error
        if isinstance(error, ReadOnlyError | MasterDownError) or any(word in str(error) for word in _NOT_NOW):
            raise _away(f"Redis cannot take writes now: {error}") from error
        if any(word in str(error) for word in _NOT_ALLOWED):
            hint = "give its user the rights that `streamflow redis-acl` lists for this kind of process"
            raise _away(f"Redis does not let this process do its work: {error}; {hint}") from error
        raise


def _away(message: str) -> UnavailableError:
    """The message has addresses and users, which are nothing to a client."""
    error = UnavailableError(message)
    error.for_clients = "the store cannot be used now; try again in a moment"
    return error


class Calls:
    """Commands, and scripts with the deployment's keys and policy; errors come as `redis_errors` says."""

    def __init__(self, client: redis.Redis, keys: Keys, policy: Policy) -> None:
        # Replies are bytes, int, list or None as the command has it: no type that redis-py states helps.
        self._execute: Any = client.execute_command
        self._keys = keys.shared
        self._config = json.dumps({"prefix": keys.prefix, "revision": keys.revision, **asdict(policy)})
        self._sources: dict[str, tuple[str, str]] = {}

    async def command(self, *args: Argument) -> Any:
        with redis_errors():
            return await self._execute(*args)

    async def script(self, name: str, *args: Argument) -> Any:
        """Runs `scripts/<name>.lua`: each is atomic, and safe to run again."""
        source, digest = self._source(name)
        call = (len(self._keys), *self._keys, self._config, *args)
        with redis_errors():
            try:
                return await self._execute("EVALSHA", digest, *call)
            except NoScriptError:
                return await self._execute("EVAL", source, *call)

    def _source(self, name: str) -> tuple[str, str]:
        if name not in self._sources:
            folder = files("streamflow.transport.scripts")
            source = (folder / "common.lua").read_text() + (folder / f"{name}.lua").read_text()
            self._sources[name] = source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
        return self._sources[name]
