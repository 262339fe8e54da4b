"""The gRPC health protocol, with streams that end when the server drains (those of grpc_health hold it up)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SERVING: int = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: int = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: int = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """What is serving, by name."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._closed = False
        self._changed = asyncio.Condition()

    async def set(self, names: Iterable[str], serving: bool) -> None:
        async with self._changed:
            self._serving.update(dict.fromkeys(names, serving))
            self._changed.notify_all()

    async def close(self) -> None:
        """Ends the streams once they have told what there is to tell."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no such service: {request.service[:80]!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        told = None
        while not (self._closed and told == self._status(request.service)):
            told = self._status(request.service)
            await context.write(health_pb2.HealthCheckResponse(status=told))
            async with self._changed:
                while not self._closed and told == self._status(request.service):
                    await self._changed.wait()

    def _status(self, service: str) -> int:
        if service not in self._serving:
            return _UNKNOWN
        return _SERVING if self._serving[service] else _NOT_SERVING
