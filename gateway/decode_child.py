"""A process that decodes pictures and nothing else: `python -m gateway.decode_child MEMORY_BYTES CPU_S`.

It reads requests from stdin and writes answers to stdout. What a picture can do to it, it does to this process alone:
its memory, its CPU time and its files are limited, and it has none of the gateway's settings.
"""

from __future__ import annotations

import resource
import sys
from typing import BinaryIO

from gateway import frames
from gateway.images import prepare_all
from streamflow.errors import InvalidRequestError
from streamflow.v1 import types_pb2

_MAX_FILES = 64


def limit(extra_bytes: int) -> None:
    """Of this process: so much memory on top of what it has now, few open files, and none to write."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        now_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, now_bytes + extra_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
    ):
        resource.setrlimit(what, (most, most))


def limit_cpu(seconds: int) -> None:
    """From now on; the kernel ends a process that takes more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + seconds + 1, resource.RLIM_INFINITY))


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


def main(extra_bytes: int, cpu_s: int) -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    limit(extra_bytes)
    _write(sink, frames.pack({"ready": True}, {}))
    while prefix := source.read(frames.LENGTH.size):
        limit_cpu(cpu_s)
        _write(sink, answer(source.read(frames.body_size(prefix))))


def _write(sink: BinaryIO, data: bytes) -> None:
    sink.write(data)
    sink.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
