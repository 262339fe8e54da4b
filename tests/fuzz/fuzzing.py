"""What the fuzz targets share: coverage of our own code, a first corpus made in code, and bounds.

    python -m tests.fuzz.fuzz_request -max_total_time=60 corpus

The arguments are libFuzzer's. A corpus folder that is new or empty gets the target's seeds; without one they are kept
nowhere. What ends a target is written to ./crash-<hash>: give that file as the only argument to see it again.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path

try:
    import atheris
except ImportError:
    raise SystemExit(
        "atheris is not installed; `pip install -e '.[fuzz]'` brings it (Linux, Python 3.11 to 3.13)"
    ) from None

BOUNDS = {"-max_total_time": 60, "-max_len": 1 << 16, "-timeout": 20, "-rss_limit_mb": 2048}
"""Unless the command line has others."""


def watched() -> AbstractContextManager[object]:
    """What is imported in this context is fuzzed by its coverage."""
    return atheris.instrument_imports(include=["streamflow", "gateway"])


def run(target: Callable[[bytes], None], seeds: Iterable[bytes]) -> None:
    """Fuzzes until something other than what the target allows is raised, or the bounds are met; does not return."""
    # Pillow and numpy warn of much that is no mistake here.
    warnings.simplefilter("ignore")
    program, *given = sys.argv
    names = {argument.partition("=")[0] for argument in given}
    bounds = [f"{name}={value}" for name, value in BOUNDS.items() if name not in names]
    places = [argument for argument in given if not argument.startswith("-")]
    if not places:
        places = [tempfile.mkdtemp(prefix="streamflow-fuzz-")]
    if len(places) == 1 and not Path(places[0]).is_file():
        _plant(Path(places[0]), seeds)
    flags = [argument for argument in given if argument.startswith("-")]
    atheris.Setup([program, *bounds, *flags, *places], target)
    atheris.Fuzz()


def _plant(corpus: Path, seeds: Iterable[bytes]) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    if any(corpus.iterdir()):
        return
    for seed in seeds:
        (corpus / sha256(seed).hexdigest()).write_bytes(seed)
