"""A machine that misbehaves under a program: libraries for LD_PRELOAD, compiled here.

Each takes what it needs from environment variables, named in its source.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent


def build(name: str, folder: Path) -> Path:
    """The library of `<name>.c`, made in `folder`. Skips the test where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("needs a C compiler (cc) for a library to preload, and there is none on the PATH")
    library = folder / f"{name}.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCES / f"{name}.c", "-ldl"],
        check=True,
        timeout=60,
    )
    return library


class Clock:
    """The time of a program that runs with `clock.so` and FAULT_CLOCK=<path>: it jumps while the program runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shift(0)

    def shift(self, seconds: int) -> None:
        """From now on it is so many seconds later (earlier, where negative) than it really is."""
        # In place: the program has the file mapped.
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))


class FsyncLog:
    """What a program that runs with `fsync_log.so` and FAULT_FSYNC_LOG=<path> has on the disk for certain."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def safe_bytes(self, file: Path) -> int:
        """How long the file was when its last completed fsync began."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        sizes = [int(size) for size, _, name in (line.partition(" ") for line in lines) if name == str(file)]
        return sizes[-1] if sizes else 0
