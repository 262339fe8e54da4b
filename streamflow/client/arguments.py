"""What is checked of a client's own arguments before anything is sent."""

from __future__ import annotations

import re
import ssl
from numbers import Real
from pathlib import Path
from typing import Any

from streamflow.errors import InvalidRequestError

# Images come in parts of 1 MiB, with some bytes about them; gRPC counts in 32 bits.
_LEAST_BYTES, _MOST_BYTES = 2 * 2**20, 2**30
_MOST_PORT = 2**16 - 1
_MOST_S = 30 * 24 * 3600
_MOST_PEM_BYTES = 16 * 2**20
_HOST_PORT = re.compile(r"(?:\[[0-9A-Za-z:.%]+\]|[^:/\s\[\]]+):([0-9]{1,5})", re.ASCII)
# What gRPC resolves besides; a host's name stands before a port that is a number.
_RESOLVED = re.compile(r"(?:dns|unix|unix-abstract|vsock|ipv4|ipv6|xds):.+")
_SCHEME = re.compile(r"^\w+://")


def check_address(value: str) -> str:
    """Raises InvalidRequestError: gRPC would take a port modulo 65536, and look for a host named "http"."""
    allowed = "host:port, such as 127.0.0.1:50051 or [::1]:50051"
    if not (isinstance(value, str) and value.isascii() and value.isprintable()):
        raise InvalidRequestError("address", value, allowed)
    if found := _HOST_PORT.fullmatch(value):
        if 1 <= int(found[1]) <= _MOST_PORT:
            return value
        raise InvalidRequestError("address", value, allowed, f"ports are 1 to {_MOST_PORT}")
    if _RESOLVED.fullmatch(value):
        return value
    hint, bare = "", _SCHEME.sub("", value).partition("/")[0]
    if bare != value:
        hint = "without a scheme or a path; TLS is a setting of its own"
    elif value and ":" not in value and " " not in value:
        hint = f"with its port: {value}:50051, or {value}:443 where a proxy serves it"
    raise InvalidRequestError("address", value, allowed, hint)


def check_timeout_s(value: Any, name: str = "timeout_s") -> float:
    """Raises InvalidRequestError."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and 0 < value <= _MOST_S):
        raise InvalidRequestError(name, value, f"seconds, more than 0 and at most {_MOST_S} (30 days)")
    return float(value)


def check_text(name: str, value: Any) -> str:
    """Raises InvalidRequestError, where protobuf would speak of a bad argument type."""
    try:
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeEncodeError:
        pass
    raise InvalidRequestError(name, value, "a string that UTF-8 can carry")


def check_api_key(value: str | None) -> str | None:
    """Raises InvalidRequestError, which does not tell the key."""
    if value is not None and not (isinstance(value, str) and value.isascii() and value.isprintable()):
        raise InvalidRequestError("api_key", "characters that are not shown", "printable ASCII characters in one line")
    return value


def check_max_message_bytes(value: Any) -> int:
    """Raises InvalidRequestError."""
    if not isinstance(value, int) or not _LEAST_BYTES <= value <= _MOST_BYTES:
        raise InvalidRequestError("max_message_bytes", value, f"{_LEAST_BYTES} to {_MOST_BYTES}")
    return value


def root_ca_of(tls: bool | bytes | str | Path | None) -> bytes | None:
    """The authorities to trust; None = the system's, or no TLS at all.

    Raises:
        InvalidRequestError: there is no such file, or it holds no certificate.
    """
    if tls is None or isinstance(tls, bool):
        return None
    if not isinstance(tls, bytes | str | Path):
        raise InvalidRequestError("tls", tls, "True, False, or a path or the bytes of certificates in PEM form")
    pem = tls if isinstance(tls, bytes) else _read(Path(tls))
    try:
        # Bundles have comments in all languages between their certificates.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        given = "bytes" if isinstance(tls, bytes) else str(tls)
        raise InvalidRequestError("tls", given, "certificates of authorities in PEM form") from None
    return pem


def _read(path: Path) -> bytes:
    """A file or a pipe, as far as certificates can go."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST_PEM_BYTES)
    except OSError as error:
        raise InvalidRequestError("tls", str(path), "a file that can be read", error.strerror or "") from error
