"""Which commands of Redis a script can call, read from its source, without the functions that it never reaches."""

from __future__ import annotations

import re
from importlib.resources import files

_FOLDER = files("streamflow.transport.scripts")
_CALL = re.compile(r"redis\.p?call\(\s*'([A-Z]+)'(?:\s*,\s*'([A-Z]+)')?")
_FUNCTION = re.compile(r"^local function (\w+)\(", re.MULTILINE)
_SUBCOMMANDS = ("XGROUP", "XINFO")


def script_names() -> list[str]:
    names = [one.name.removesuffix(".lua") for one in _FOLDER.iterdir() if one.name.endswith(".lua")]
    return sorted(set(names) - {"common"})


def commands_of(script: str) -> set[str]:
    """Such as {"hget", "xgroup|create"}; those of the functions of common.lua that it reaches, and no others."""
    common = (_FOLDER / "common.lua").read_text()
    starts = [*_FUNCTION.finditer(common)]
    ends = [one.start() for one in starts[1:]] + [len(common)]
    bodies = {one[1]: common[one.start() : end] for one, end in zip(starts, ends, strict=True)}
    # What stands outside of functions runs in every script.
    reached, source = set(), common[: starts[0].start()] + (_FOLDER / f"{script}.lua").read_text()
    while True:
        new = {name for name in bodies if name not in reached and re.search(rf"\b{name}\b", source)}
        if not new:
            return {_name(*found) for found in _CALL.findall(source)}
        reached |= new
        source += "".join(bodies[name] for name in new)


def _name(command: str, second: str) -> str:
    return f"{command}|{second}".lower() if command in _SUBCOMMANDS else command.lower()
