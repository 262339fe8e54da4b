"""`streamflow.json`: an optional file of a checkpoint with what its configs do not say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from streamflow.errors import InvalidRequestError
from streamflow.families.files import read_json

ADVICE = "streamflow.json"
FLOWS = ("auto", "rectified", "instaflow", "2rf", "perflow")
"""Values of `flow`; see flows.py."""

_DECODERS = ("tiny", "full")


class _Kind(NamedTuple):
    fits: Callable[[Any], bool]
    allowed: str


def _whole(least: int, most: int) -> _Kind:
    return _Kind(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
        f"a whole number from {least} to {most}",
    )


def _one_of(*names: str) -> _Kind:
    return _Kind(lambda value: value in names, "one of " + ", ".join(names))


_TEXT = _Kind(lambda value: isinstance(value, str) and bool(value), "a text")
_SIDE = _whole(8, 2**16)

_KINDS: Mapping[str, _Kind] = {
    "default_steps": _whole(1, 1000),
    "max_steps": _whole(1, 1000),
    "default_guidance_scale": _Kind(
        lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value <= 100
            and math.isfinite(value)
        ),
        "a number from 0 to 100",
    ),
    "default_sampler": _TEXT,
    "default_decoder": _one_of(*_DECODERS),
    "default_size": _SIDE,
    "max_width": _SIDE,
    "max_height": _SIDE,
    "t5_tokens": _whole(1, 4096),
    "evaluates_data": _Kind(lambda value: isinstance(value, bool), "true or false"),
    "flow": _one_of(*FLOWS),
    **dict.fromkeys(("unet_delta", "tiny_vae", "adapters", "controls"), _TEXT),
}


def read_advice(folder: Path) -> Mapping[str, Any]:
    """What the file says; empty without it.

    Raises:
        InvalidRequestError: it says something that there is not, or a value that cannot be; the message names both.
    """
    if not (folder / ADVICE).exists():
        return {}
    said = read_json(folder, ADVICE)
    for name, value in said.items():
        if name not in _KINDS:
            raise InvalidRequestError(str(folder / ADVICE), name, "one of " + ", ".join(_KINDS))
        if not _KINDS[name].fits(value):
            raise InvalidRequestError(f"{folder / ADVICE}: {name}", value, _KINDS[name].allowed)
    return said
