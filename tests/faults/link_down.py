"""A machine whose only network goes down and up again: `unshare -rn python -m tests.faults.link_down`.

Writes what became of the requests as JSON.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import socket
import struct
import sys

from tests.faults.harness import Tally, light_deployment
from tests.faults.silence import meet_silence

# Requests and flag of linux/sockios.h and linux/if.h.
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def loopback_is_up() -> bool:
    return bool(_flags(_SIOCGIFFLAGS) & _IFF_UP)


def set_loopback(*, up: bool) -> None:
    """Raises PermissionError where the network is not ours."""
    _flags(_SIOCSIFFLAGS, _IFF_UP * up)


def _flags(request: int, flags: int = 0) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, request, struct.pack("16sh14x", b"lo", flags))
    return int(struct.unpack("16sh14x", answer)[1])


async def main() -> None:
    tally = Tally("the link is down")
    async with light_deployment(slots=8) as deployment:
        await meet_silence(
            deployment,
            deployment.address,
            tally,
            begin=lambda: set_loopback(up=False),
            end=lambda: set_loopback(up=True),
        )
    json.dump({"requests": tally.requests, "recovery_s": tally.recovery_s}, sys.stdout)


if __name__ == "__main__":
    # A new namespace has nothing else, and that is down: the network of whoever runs this is left alone.
    if socket.if_nameindex() != [(1, "lo")] or loopback_is_up():
        sys.exit("link_down needs a new network namespace of its own: unshare -rn python -m tests.faults.link_down")
    set_loopback(up=True)
    asyncio.run(main())
