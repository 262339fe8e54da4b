"""Addresses and ports to listen on, tried with plain sockets before a server takes them.

gRPC binds as many of a name's addresses as it can and only logs those that another process holds; a client of that
name would then reach either process. So names are resolved here, and every address of one must be free.
"""

from __future__ import annotations

import errno
import random
import socket
from collections import deque
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

LOOPBACK = "127.0.0.1"

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL, _LEAST_PORT, _FEW = range(20_768, 32_768), 1024, 1000
_TRIES = 64
# Who asked for one may not have bound it yet.
_given: deque[int] = deque(maxlen=256)
# Its own: whoever seeds the common one would get the ports of others who did.
_RANDOM = random.SystemRandom()


def local_addresses(host: str) -> list[str]:
    """The numeric addresses of this machine that `host` stands for.

    Raises:
        OSError: there is none.
    """
    found = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses: list[str] = list(dict.fromkeys(str(place[0]) for *_, place in found))
    ours, failure = [], OSError(errno.EADDRNOTAVAIL, "not an address of this machine")
    for address in addresses:
        try:
            with _bound(address, 0):
                ours.append(address)
        except OSError as error:
            failure = error
    if not ours:
        raise failure
    return ours


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it.

    Raises:
        OSError: see `local_addresses`.
    """
    return all(ip_address(address.partition("%")[0]).is_loopback for address in local_addresses(host))


def free_port(host: str = LOOPBACK) -> int:
    """A port that is free on every address of `host`, and that was not given before by this function.

    It is below those that the system chooses from, where that leaves any: a port that it chose could be taken by an
    outgoing connection before a server binds it.

    Raises:
        OSError: `host` has no address here, or none of some ports was free on all of them.
    """
    addresses, ports = local_addresses(host), _ports()
    for _ in range(_TRIES):
        port = _RANDOM.choice(ports)
        if port in _given:
            continue
        try:
            _require_free(addresses, port)
        except OSError:
            continue
        _given.append(port)
        return port
    raise OSError(errno.EADDRINUSE, f"no port is free on all of {', '.join(addresses)}")


def require_free(host: str, port: int) -> None:
    """Raises OSError when another process holds `port` on an address of `host`, or `host` has none here.

    Port 0 asks for the address alone.
    """
    _require_free(local_addresses(host), port)


def join(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _ports() -> range:
    """Those below where the system's begin; it says so, or has Linux's usual ones."""
    try:
        first = int(_RANGE.read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        first = _USUAL.stop
    below = range(max(_LEAST_PORT, first - len(_USUAL)), first)
    return below if len(below) > _FEW else _USUAL


def _require_free(addresses: list[str], port: int) -> None:
    with ExitStack() as held:
        for address in addresses:
            held.enter_context(_bound(address, port))


def _bound(address: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # As servers do: the closed connections of one that has just ended are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
    except OSError:
        probe.close()
        raise
    return probe
