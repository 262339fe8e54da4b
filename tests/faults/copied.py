"""The product with some of its scripts changed, as processes of their own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.harness import LIGHT

ROOT = Path(__file__).parents[2]

Change = tuple[str, str, str]
"""In this script this text becomes that."""

UNHEARD: Sequence[Change] = (
    ("heartbeat.lua", "lost[#lost + 1] = entry", "local _ = entry"),
    ("heartbeat.lua", "cancelled[#cancelled + 1] = entry", "local _ = entry"),
)
"""No worker is told that its entries are with others by now, or that their jobs ended."""


def copied(folder: Path, changes: Sequence[Change]) -> Mapping[str, Sequence[str]]:
    """Commands that run a copy of the product in which these changes were made."""
    for name in ("streamflow", "gateway", "services", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script, old, new in changes:
        path = folder / "streamflow" / "transport" / "scripts" / script
        source = path.read_text("utf-8")
        assert old in source, f"{script} has no {old!r} any more: mend the mutant"
        path.write_text(source.replace(old, new), "utf-8")
    start = (
        "import runpy, sys; folder, module = sys.argv[1:3]; del sys.argv[1:3]; sys.path.insert(0, folder); "
        "runpy.run_module(module, run_name='__main__', alter_sys=True)"
    )
    return {
        name: (sys.executable, "-c", start, str(folder), module, *arguments)
        for name, (_, _, module, *arguments) in LIGHT.items()
    }
