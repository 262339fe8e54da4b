"""The options by which every command finds its gateway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from streamflow.client import Client

_CONNECT_TIMEOUT_S = 3.0

Address = Annotated[
    str | None,
    typer.Option("--address", "-a", metavar="HOST:PORT", help="The gateway [STREAMFLOW_ADDRESS, 127.0.0.1:50051]."),
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="Key to send with every call [STREAMFLOW_API_KEY].")]
Tls = Annotated[bool, typer.Option("--tls", help="Encrypt, and trust the system's certificate authorities.")]
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="FILE", help="Encrypt, and trust this authority (PEM) [STREAMFLOW_TLS_CA]."),
]


def connect(
    address: str | None, api_key: str | None, tls: bool, tls_ca: Path | None, *, timeout_s: float = 600.0
) -> Client:
    """A client by the options, and by the environment where they are silent."""
    from streamflow.config import ClientSettings, quiet_grpc

    # What goes wrong with a connection is told in one line, by us.
    quiet_grpc()
    from streamflow.client import Client

    settings = ClientSettings()
    return Client(
        address or settings.address,
        api_key=api_key or settings.api_key,
        tls=tls_ca or settings.tls_ca or tls,
        timeout_s=timeout_s,
        connect_timeout_s=_CONNECT_TIMEOUT_S,
    )
