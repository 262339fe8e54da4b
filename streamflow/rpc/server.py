"""The asyncio gRPC server that all services share: health, reflection, limits, keys, TLS, drain.

    async with RpcServer(settings, services=[Service(NAME, add_GatewayServicer_to_server, servicer)]) as server:
        await server.set_ready(True)
        await server.run_until_stopped()  # SIGTERM or SIGINT; returns when drained

Health knows two things apart: "" and "liveness" say that the process serves, the services' full names that it is ready.
It also answers on a port of its own where it is asked to: probes that know neither TLS nor keys use that one.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from streamflow.config import Settings
from streamflow.errors import UnavailableError
from streamflow.ports import free_port, is_loopback, join, local_addresses
from streamflow.rpc.auth import ApiKeys, Keys
from streamflow.rpc.health import Health
from streamflow.rpc.interceptors import (
    MAX_HEALTH_BYTES,
    MAX_HEALTH_CALLS,
    Authenticator,
    CallLimit,
    CallTimer,
    RefusalLog,
    RequestParser,
)
from streamflow.telemetry import get_logger

LIVENESS = ("", "liveness")

# After the grace period calls are cut; those that end themselves just before it must not be.
_CUT_AFTER_S = 2.0

_log = get_logger(__name__)

OnDrain = Callable[[float], Awaitable[None]]
"""Called once with the grace period in seconds; finishes or hands back what is under way, then returns."""


@dataclass(frozen=True, slots=True)
class Service:
    """One gRPC service: its full name, the generated function that adds it, and what answers its calls.

    Attributes:
        for_tenants: names of the methods that any known key opens. Those that nobody put here take an operator's key.
    """

    name: str
    add: Callable[[Any, Any], None]
    servicer: object
    for_tenants: frozenset[str] = frozenset()


class RpcServer:
    """Serves while its context is entered.

    Args:
        settings: address, limits, reflection, grace period.
        services: what it serves.
        keys: of which every call must carry one; None = no keys are asked for.
        credentials: for TLS; see `certificates.CertificateFiles`.
        on_call: told of every call's method, status and seconds when it is over.
        on_drain: see OnDrain; runs while calls under way go on and new ones are refused.
        health_port: health alone is answered on this port as well, never encrypted, until all else has ended; 0 = none.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        services: Sequence[Service],
        keys: Keys | None = None,
        credentials: grpc.ServerCredentials | None = None,
        on_drain: OnDrain | None = None,
        on_call: Callable[[str, str, float], None] | None = None,
        health_port: int = 0,
    ) -> None:
        self._settings = settings
        self._names = [service.name for service in services]
        self._credentials = credentials
        self._on_drain = on_drain
        self._health = Health()
        self._stop = asyncio.Event()
        self._draining = False
        self._keys = keys = ApiKeys() if keys is None else keys
        for_tenants = {f"/{service.name}/{method}" for service in services for method in service.for_tenants}
        # The first one is the outermost.
        methods = _methods(self._names)
        interceptors: list[Any] = [] if on_call is None else [CallTimer(on_call, methods)]
        interceptors += [
            RefusalLog(keys, methods),
            Authenticator(keys, for_tenants),
            CallLimit(keys, settings.max_calls),
            RequestParser(keys),
        ]
        self._server = grpc.aio.server(
            interceptors=interceptors, options=_options(settings.max_message_bytes, max_calls=settings.max_calls)
        )
        for service in services:
            service.add(service.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health_port = health_port
        # A server of its own, since every port of a server answers all of its services.
        nobodys = ApiKeys()
        self._health_server = grpc.aio.server(
            interceptors=[CallLimit(nobodys, 1), RequestParser(nobodys)],
            options=_options(MAX_HEALTH_BYTES, max_calls=0),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)
        if settings.reflection:
            reflection.enable_server_reflection(
                [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
            )
        self.port = 0

    def __repr__(self) -> str:
        return f"<RpcServer {self.address} {', '.join(self._names)}{' draining' if self._draining else ''}>"

    @property
    def address(self) -> str:
        """`host:port` as bound; the port is known once the context is entered."""
        return join(self._settings.host, self.port)

    async def __aenter__(self) -> Self:
        self.port = self._bind()
        await self._health.set(LIVENESS, True)
        await self.set_ready(False)
        await self._server.start()
        await self._health_server.start()
        keys, tls = "on" if self._keys.on else "off", self._credentials is not None
        _log.info("serving", address=self.address, services=self._names, tls=tls, keys=keys)
        if self._names and not self._keys.on and not is_loopback(self._settings.host):
            _log.warning("no keys are asked for: whoever can reach this address may call", address=self.address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.drain()
            else:
                await self._server.stop(0)
        finally:
            # Last: a process that drains is alive, and whoever asks should hear it.
            await self._health_server.stop(0)

    async def set_ready(self, ready: bool) -> None:
        """Says whether calls of the services can be answered now; never true again after the drain began."""
        await self._health.set(self._names, ready and not self._draining)

    def request_stop(self) -> None:
        """What SIGTERM does: `run_until_stopped` drains and returns."""
        self._stop.set()

    async def run_until_stopped(self) -> None:
        """Serves until SIGTERM, SIGINT or `request_stop`, then drains. A second signal ends the process at once."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.request_stop)
        try:
            await self._stop.wait()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
        await self.drain()

    async def drain(self) -> None:
        """Not ready, new calls refused, work under way finished or handed back, stopped; safe to repeat."""
        grace_s = self._settings.drain_grace_s
        if self._draining:
            # Somebody else began; nobody leaves before the server has stopped.
            await self._server.stop(grace_s + _CUT_AFTER_S)
            return
        _log.info("draining", address=self.address, grace_s=grace_s)
        self._draining = True
        await self.set_ready(False)
        await self._health.close()
        async with asyncio.TaskGroup() as tasks:
            # From its first step on, stop() takes no new calls; it waits for those under way.
            tasks.create_task(self._server.stop(grace_s + _CUT_AFTER_S), name="stop gRPC server")
            if self._on_drain is not None:
                tasks.create_task(_run(self._on_drain, grace_s), name="drain work")
        _log.info("stopped", address=self.address)

    def _bind(self) -> int:
        host, credentials = self._settings.host, self._credentials
        port = _listen(self._server, host, self._settings.port, credentials, hint="port 0 takes a free one")
        if self._health_port:
            _listen(self._health_server, host, self._health_port, None, hint="health port 0 is none")
        return port


def _listen(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None, *, hint: str
) -> int:
    """Takes the port on every address of `host`, and returns it: a free one for 0."""
    try:
        taken = port or free_port(host)
        for address in local_addresses(host):
            if credentials is None:
                server.add_insecure_port(join(address, taken))
            else:
                server.add_secure_port(join(address, taken), credentials)
    except (OSError, RuntimeError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise UnavailableError(
            f"cannot listen on {join(host, port)}{reason}: choose another host or port ({hint})"
        ) from error
    return taken


async def _run(on_drain: OnDrain, grace_s: float) -> None:
    await on_drain(grace_s)


def _methods(services: Sequence[str]) -> set[str]:
    """As `/service/method`."""
    found = (descriptor_pool.Default().FindServiceByName(name) for name in services)
    return {f"/{service.full_name}/{method.name}" for service in found for method in service.methods}


def _options(max_message_bytes: int, *, max_calls: int) -> list[tuple[str, Any]]:
    return [
        # Of one connection; a few more than are taken, so that whoever is too many hears of it rather than waits.
        ("grpc.max_concurrent_streams", max_calls + MAX_HEALTH_CALLS),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Otherwise a minute, whatever the keepalive's own says.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients ping every 10 s; fewer than 5 s apart is abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # Two processes on one port would share the calls without anybody noticing.
        ("grpc.so_reuseport", 0),
    ]
