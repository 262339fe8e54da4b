"""Checkpoint folders in diffusers layout: reading their configs, and the revision of their weights. Without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamflow.errors import InvalidRequestError

RECOMMENDED = "streamflow.json"
"""Optional file of a checkpoint with what its own configs do not hold: recommended steps, guidance, limits."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder / name`.

    Raises:
        InvalidRequestError: it is missing or broken; the message names the part.
    """
    path = folder / name
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequestError(
            "model", str(folder), f"a checkpoint folder in diffusers layout, with {name}"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidRequestError("model", str(path), "a readable JSON file", str(error)) from error
    if not isinstance(value, dict):
        raise InvalidRequestError("model", str(path), "a JSON object")
    return value


def recommended(folder: Path) -> dict[str, Any]:
    """The settings in `streamflow.json`; empty without that file."""
    return read_json(folder, RECOMMENDED) if (folder / RECOMMENDED).exists() else {}


def weights_revision(folder: Path, parts: Iterable[str]) -> str:
    """A hash of the configs and weights in these parts of a checkpoint: 16 hex digits."""
    digest = hashlib.sha256()
    for part in sorted(parts):
        for path in sorted((folder / part).rglob("*")):
            if path.suffix in {".json", ".safetensors", ".txt"}:
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
