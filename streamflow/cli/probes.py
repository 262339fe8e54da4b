"""Whether what a deployment needs is there, and whether its processes are ready."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamflow.errors import UnavailableError

if TYPE_CHECKING:
    from streamflow.transport.redis_access import RedisAccess

_PROBE_S = 0.1
_PROBE_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]


async def check_redis(access: RedisAccess) -> None:
    """Raises UnavailableError when there is no Redis, or it does not let us in; InvalidRequestError: wrong settings."""
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    access.check()
    url, options = access.connection_options()
    try:
        async with Redis.from_url(url, socket_connect_timeout=5.0, socket_timeout=5.0, **options) as client:
            await client.ping()
    except (RedisError, OSError) as error:
        raise UnavailableError(f"the Redis at {access.where} cannot be used: {error}") from error


async def serving(address: str, service: str) -> None:
    """Returns when the process at `address` says that `service` is ready."""
    request = health_pb2.HealthCheckRequest(service=service)
    async with grpc.aio.insecure_channel(address, options=_PROBE_OPTIONS) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = await stub.Check(request, timeout=2.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:  # not there yet: its exit is noticed elsewhere
                pass
            await asyncio.sleep(_PROBE_S)
