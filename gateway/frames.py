"""What the gateway and the processes that decode pictures say to each other: JSON and bytes, never pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

LENGTH = struct.Struct("<I")
MAX_BYTES = 2**28


def pack(about: Mapping[str, Any], blobs: Mapping[str, bytes]) -> bytes:
    """A frame with its length in front."""
    head = json.dumps({"about": about, "sizes": {name: len(blob) for name, blob in blobs.items()}}).encode()
    body = b"".join([LENGTH.pack(len(head)), head, *blobs.values()])
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Raises ValueError for what is no frame."""
    try:
        [size] = LENGTH.unpack_from(body)
        at = LENGTH.size + size
        head = json.loads(body[LENGTH.size : at])
        blobs = {}
        for name, length in head["sizes"].items():
            blobs[str(name)] = body[at : at + int(length)]
            at += int(length)
        about = dict(head["about"])
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a frame: {error}") from error
    if at != len(body):
        raise ValueError("not a frame: its parts do not add up to its length")
    return about, blobs


def body_size(prefix: bytes) -> int:
    """Raises ValueError for a frame that is too large."""
    [size] = LENGTH.unpack(prefix)
    if size > MAX_BYTES:
        raise ValueError(f"a frame of {size} bytes; allowed: {MAX_BYTES}")
    return int(size)
