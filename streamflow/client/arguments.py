"""What is checked of a client's own arguments before anything is sent."""

from __future__ import annotations

import re
import ssl
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from streamflow.errors import InvalidRequestError
from streamflow.pictures import read_file

# Images come in parts of 1 MiB, with some bytes about them; gRPC counts in 32 bits.
_LEAST_BYTES, _MOST_BYTES = 2 * 2**20, 2**30
_MOST_PORT = 2**16 - 1
_HOST_PORT = re.compile(r"(\[[^\]]*\]|[^:/\s]+):(\d+)")
# What gRPC resolves besides; a host's name stands before a port that is a number.
_RESOLVED = re.compile(r"(dns|unix|unix-abstract|vsock|ipv4|ipv6|xds):.")


def check_address(value: str) -> str:
    """Raises InvalidRequestError: gRPC would take a port modulo 65536, and look for a host named "http"."""
    allowed = "host:port, such as 127.0.0.1:50051 or [::1]:50051"
    if not isinstance(value, str):
        raise InvalidRequestError("address", value, allowed)
    if found := _HOST_PORT.fullmatch(value):
        if 1 <= int(found[2]) <= _MOST_PORT:
            return value
        raise InvalidRequestError("address", value, allowed, f"ports are 1 to {_MOST_PORT}")
    if _RESOLVED.match(value):
        return value
    hint = ""
    if "://" in value:
        hint = f"without a scheme: {urlsplit(value).netloc or 'host:port'}; TLS is a setting of its own"
    elif value and not re.search(r"[:\s/]", value):
        hint = f"with its port: {value}:50051"
    raise InvalidRequestError("address", value, allowed, hint)


def check_timeout_s(value: Any, name: str = "timeout_s") -> float:
    """Raises InvalidRequestError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
        raise InvalidRequestError(name, value, "a finite number of seconds above 0")
    return float(value)


def check_text(name: str, value: Any) -> str:
    """Raises InvalidRequestError, where protobuf would speak of a bad argument type."""
    if not isinstance(value, str):
        raise InvalidRequestError(name, value, "text")
    return value


def check_api_key(value: str | None) -> str | None:
    """Raises InvalidRequestError, which does not tell the key."""
    if value is not None and not (isinstance(value, str) and value.isascii() and value.isprintable()):
        raise InvalidRequestError("api_key", "something else (not shown)", "printable ASCII characters in one line")
    return value


def check_max_message_bytes(value: Any) -> int:
    """Raises InvalidRequestError."""
    if not isinstance(value, int) or not _LEAST_BYTES <= value <= _MOST_BYTES:
        raise InvalidRequestError("max_message_bytes", value, f"{_LEAST_BYTES} to {_MOST_BYTES}")
    return value


def root_ca_of(tls: bool | bytes | str | Path) -> bytes | None:
    """The authorities to trust; None = the system's, or no TLS at all.

    Raises:
        InvalidRequestError: there is no such file, or it holds no certificate.
    """
    if isinstance(tls, bool):
        return None
    pem = tls if isinstance(tls, bytes) else read_file("tls", Path(tls))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):
        given = "bytes" if isinstance(tls, bytes) else str(tls)
        raise InvalidRequestError("tls", given, "certificates of authorities in PEM form") from None
    return pem
