"""Channels to StreamFlow's services, synchronous and asyncio, with one set of options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

DEFAULT_MAX_MESSAGE_BYTES = 64 * 2**20

# No retries by gRPC itself but of calls that no server saw: it would keep to itself what a gateway answered.
_CONFIG: dict[str, Any] = {
    # Several gateways behind one name share the calls.
    "loadBalancingConfig": [{"round_robin": {}}],
}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a service is, and how to talk to it.

    Attributes:
        address: "host:port", or what else gRPC resolves, such as "dns:///gateway:50051".
        tls: encrypt; `root_ca` (PEM) says whom to trust in place of the system's authorities, and implies `tls`.
        server_name: what the server's certificate must name, where that is not the host of `address`.
        max_message_bytes: largest message either way.
    """

    address: str
    tls: bool = False
    root_ca: bytes | None = None
    server_name: str = ""
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None where the channel is not encrypted."""
        if not self.tls and self.root_ca is None:
            return None
        return grpc.ssl_channel_credentials(root_certificates=self.root_ca)

    def options(self, given: Sequence[tuple[str, Any]] | None = None) -> list[tuple[str, Any]]:
        """Of a channel: `channel_options` where none are given, and the server's name."""
        options = channel_options(self.max_message_bytes) if given is None else given
        return [*options, *([("grpc.ssl_target_name_override", self.server_name)] if self.server_name else [])]


def open_channel(target: Target, options: Sequence[tuple[str, Any]] | None = None) -> grpc.Channel:
    """A channel for calls that block; close it, or use it as a context manager.

    Args:
        options: in place of `channel_options`.
    """
    credentials, given = target.credentials, target.options(options)
    if credentials is None:
        return grpc.insecure_channel(target.address, options=given)
    return grpc.secure_channel(target.address, credentials, options=given)


def open_aio_channel(target: Target, options: Sequence[tuple[str, Any]] | None = None) -> grpc.aio.Channel:
    """A channel for asyncio; it belongs to the running event loop. Arguments are those of `open_channel`."""
    credentials, given = target.credentials, target.options(options)
    if credentials is None:
        return grpc.aio.insecure_channel(target.address, options=given)
    return grpc.aio.secure_channel(target.address, credentials, options=given)


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries an API key, for every call; empty without one."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def channel_options(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> list[tuple[str, Any]]:
    """Message limits both ways, keepalive, and retries of calls that never reached a server."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A connection that died without a word is found out after 15 s at most.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # Otherwise a minute, whatever the keepalive's own says.
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(_CONFIG)),
        # Without this a request over 256 KiB, such as one with an init image, is never sent again.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes + 2**20),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
