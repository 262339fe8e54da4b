"""A process that decodes pictures and nothing else: `python -m gateway.decode_child MEMORY_BYTES CPU_S`.

It reads requests from stdin and writes answers to stdout. What a picture can do to it, it does to this process alone:
its memory and its CPU time are limited, it can open nothing, and it has none of the gateway's settings.
"""

from __future__ import annotations

import ctypes
import io
import resource
import signal
import sys
import time
from typing import BinaryIO

from PIL import ExifTags, Image

from gateway import frames
from gateway.images import prepare_all
from streamflow.errors import InvalidRequestError
from streamflow.v1 import types_pb2

# Of a process's whole life; the kernel ends it then, whatever runs in it.
LIFE_CPU_S = 600

_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITIES_3 = 0x20080522


def rehearse() -> None:
    """Loads what decoding and refusing takes, which Pillow does at the first picture of a kind: later no file opens."""
    Image.init()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        out = io.BytesIO()
        Image.new("RGB", (16, 16)).save(out, kind, exif=turned)
        picture = out.getvalue()
        for mask in (picture, b"nothing"):
            images = {"init": picture, "mask": mask, "control": picture}
            frame = frames.pack({"width": 8, "height": 8, "max_pixels": 4096}, images)
            answer(frame[frames.LENGTH.size :])


def limit(extra_bytes: int, life_cpu_s: int) -> None:
    """Of this process: so much memory on top of what it has now, and nothing new: no file, socket, process or right."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # As root it could take its limits back.
    libc.capset((ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)())
    with open("/proc/self/statm", encoding="ascii") as statm:
        now_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, now_bytes + extra_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, life_cpu_s),
        # Without effect on root.
        (resource.RLIMIT_NPROC, 0),
        # What is open stays so.
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(what, (most, most))
    # By the clock of RLIMIT_CPU, which counts whole ticks: on a busy machine it is seconds ahead of all others.
    signal.setitimer(signal.ITIMER_PROF, life_cpu_s - time.process_time())


def limit_cpu(seconds: int) -> None:
    """From now on; the kernel ends a process that takes more."""
    most_s = resource.getrlimit(resource.RLIMIT_CPU)[1]
    until_s = int(most_s - _left_s()) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (min(until_s, most_s), most_s))


def has_time(seconds: int) -> bool:
    """Whether its life is long enough for one more request."""
    return _left_s() > seconds + 2


def _left_s() -> float:
    return signal.getitimer(signal.ITIMER_PROF)[0]


def answer(body: bytes) -> bytes:
    about, images = frames.unpack(body)
    control = types_pb2.Control(image=images["control"])
    request = types_pb2.GenerateRequest(init_image=images["init"], mask_image=images["mask"], control=control)
    try:
        found = prepare_all(request, width=about["width"], height=about["height"], max_pixels=about["max_pixels"])
    except InvalidRequestError as error:
        parts = {"field": error.field, "given": error.given, "allowed": error.allowed, "hint": error.hint}
        return frames.pack({"refused": str(error), "parts": parts}, {})
    return frames.pack({}, found)


def main(extra_bytes: int, cpu_s: int, life_cpu_s: int = LIFE_CPU_S) -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    rehearse()
    limit(extra_bytes, life_cpu_s)
    _write(sink, frames.pack({"ready": True}, {}))
    while prefix := source.read(frames.LENGTH.size):
        limit_cpu(cpu_s)
        _write(sink, answer(source.read(frames.body_size(prefix))))
        _write(sink, frames.pack({"go_on": has_time(cpu_s)}, {}))


def _write(sink: BinaryIO, data: bytes) -> None:
    sink.write(data)
    sink.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
