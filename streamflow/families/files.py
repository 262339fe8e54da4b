"""The files of a checkpoint: configs, weights, and hashes of them that are computed once. Without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamflow.errors import InvalidRequestError

_TEXTS = {".json", ".txt", ".model"}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder / name`.

    Raises:
        InvalidRequestError: it is missing or broken; the message names the part.
    """
    path = folder / name
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        hint = "" if folder.is_dir() else "there is no such folder"
        raise InvalidRequestError(
            "model", folder, f"a checkpoint folder in diffusers layout, with {name}", hint
        ) from error
    except NotADirectoryError as error:
        raise InvalidRequestError(
            "model", folder, "the folder of a checkpoint in diffusers layout", "it is a file"
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidRequestError("model", path, "a readable JSON file", str(error)) from error
    if not isinstance(value, dict):
        raise InvalidRequestError("model", path, "a JSON object")
    return value


def loaded_files(path: Path) -> list[Path]:
    """What is read of a part: its configs, its vocabulary, and its weights in the one form that is loaded.

    Other tools put the same weights into the same folder in other forms; they change nothing here.
    """
    if path.is_file():
        return [path]
    texts = [one for one in path.rglob("*") if one.suffix in _TEXTS and one.is_file()]
    return sorted([*texts, *(weight_files(path) or pickles(path))])


def weight_files(part: Path) -> list[Path]:
    """The safetensors files from which a part is loaded: all shards, or the one file; empty where there are none.

    Raises:
        InvalidRequestError: a shard is missing.
    """
    found = sorted(part.glob("*.safetensors"))
    # Variants, such as those in half precision, stand beside the others.
    plain = [path for path in found if path.name.count(".") == 1]
    indices = sorted(part.glob("*.safetensors.index*.json"), key=lambda path: path.name.count("."))
    for index in indices[:1]:
        try:
            shards = sorted(map(str, set(json.loads(index.read_text("utf-8"))["weight_map"].values())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequestError("model", index, "a readable index of weights", str(error)) from error
        missing = [name for name in shards if not (part / name).is_file()]
        if missing:
            raise InvalidRequestError("model", part, f"a part with all its weights; missing: {missing[0]}")
        return [part / name for name in shards]
    return plain or found[:1]


def pickles(part: Path) -> list[Path]:
    """Weights in formats that can run code."""
    return sorted(path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in part.glob(pattern))


def digest_of(path: Path, remembered: Path | None) -> str:
    """SHA-256 of a file, not computed again until its size or time changes.

    Args:
        remembered: a file in which digests are kept; None = nowhere.
    """
    about = path.stat()
    key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    if key not in _DIGESTS:
        written = _read_digests(remembered)
        _DIGESTS[key] = written.get(key) or _sha256(path)
        # Small files are read as fast as looked up.
        if key not in written and about.st_size > 2**20:
            _write_digests(remembered, {**written, key: _DIGESTS[key]})
    return _DIGESTS[key]


_DIGESTS: dict[str, str] = {}
"""Of the files that this process has looked at, by path, size and time."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_digests(path: Path | None) -> dict[str, str]:
    with suppress(OSError, ValueError):
        said = {} if path is None else json.loads(path.read_text("utf-8"))
        if isinstance(said, dict):
            return {str(key): str(value) for key, value in said.items()}
    return {}


def _write_digests(path: Path | None, known: Mapping[str, str]) -> None:
    """Atomic. Of two processes that write at once one is forgotten, and computed again."""
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        os.replace(made, path)
