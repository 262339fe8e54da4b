"""A machine with GPUs, as far as listing them goes: a program called nvidia-smi for the front of the PATH."""

from __future__ import annotations

import shlex
from pathlib import Path


def uuid(number: int) -> str:
    return f"GPU-{number:08x}-1111-2222-3333-444455556666"


def listing(count: int) -> str:
    return "".join(f"GPU {k}: NVIDIA Test {k} (UUID: {uuid(k)})\n" for k in range(count))


def install(folder: Path, count: int) -> str:
    """Returns the folder, for the PATH."""
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$*" = -L ] || exit 2\nprintf %s {shlex.quote(listing(count))}\n')
    program.chmod(0o755)
    return str(folder)
