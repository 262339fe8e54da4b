"""Whether what a deployment needs is there and free, and whether its processes are ready."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamflow.errors import InvalidRequestError, UnavailableError
from streamflow.ports import join, local_addresses, require_free
from streamflow.rpc.certificates import probe_target
from streamflow.rpc.channels import Target, open_aio_channel

if TYPE_CHECKING:
    from streamflow.transport.redis_access import RedisAccess

# Its processes are one user there: `up` gives all of them the same address.
_LET_IN = (
    "name the user in redis://USER@HOST:PORT/0 or STREAMFLOW_REDIS_USER, and its password in a file "
    "(STREAMFLOW_REDIS_PASSWORD_FILE); of those that `streamflow redis-acl` makes it is administrator"
)
_PROBE_S = 0.1
_PROBE_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


def check_folders(**folders: Path | None) -> None:
    """By the names of their settings; those that are missing are made. Raises InvalidRequestError."""
    for name, folder in folders.items():
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidRequestError(name, str(folder), "a folder", error.strerror or "") from error


def check_ports(host: str, **ports: int) -> None:
    """By the names of their settings; 0 = any. Raises InvalidRequestError for what a gateway could not listen on."""
    try:
        local_addresses(host)
    except OSError as error:
        raise InvalidRequestError("host", host, "an address of this machine", error.strerror or "") from error
    taken = set()
    for name, port in ports.items():
        try:
            require_free(host, port)
        except OSError as error:
            hint = f"{error.strerror}; choose another one with --{name.replace('_', '-')}"
            raise InvalidRequestError(name, join(host, port), "a free port of this machine", hint) from error
        if port and port in taken:
            raise InvalidRequestError(name, port, "another port than the gateway's own")
        taken.add(port)


async def check_redis(access: RedisAccess) -> None:
    """Raises UnavailableError when there is no Redis; InvalidRequestError: wrong settings, or it does not let us in."""
    from redis.asyncio import Redis
    from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

    access.check()
    url, options = access.connection_options()
    try:
        async with Redis.from_url(url, socket_connect_timeout=5.0, socket_timeout=5.0, **options) as client:
            await client.ping()
    except (AuthenticationError, NoPermissionError) as error:
        allowed = "a user that this Redis lets in, with its password"
        raise InvalidRequestError("redis_url", access.where, allowed, f"{_LET_IN}. It said: {error}") from error
    except (RedisError, OSError) as error:
        raise UnavailableError(f"the Redis at {access.where} cannot be used: {error}") from error


async def _target(address: str, tls_cert: Path | None) -> Target:
    """How to ask it: of a server that encrypts, only it can tell, so this waits for it."""
    target = Target(address)
    while tls_cert is not None and target.credentials is None:
        target = await asyncio.to_thread(probe_target, address, tls_cert)
        if target.credentials is None:
            await asyncio.sleep(_PROBE_S)
    return target


async def serving(address: str, service: str, *, tls_cert: Path | None = None) -> None:
    """Returns when the process at `address` says that `service` is ready.

    Args:
        tls_cert: the certificate that it has; None = it does not encrypt.
    """
    request = health_pb2.HealthCheckRequest(service=service)
    async with open_aio_channel(await _target(address, tls_cert), _PROBE_OPTIONS) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = await stub.Check(request, timeout=2.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:  # not there yet: its exit is noticed elsewhere
                pass
            await asyncio.sleep(_PROBE_S)
