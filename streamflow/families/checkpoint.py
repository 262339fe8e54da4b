"""Checkpoint folders in diffusers layout: their configs, and the revision of their weights. Without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from streamflow.errors import InvalidRequestError

RECOMMENDED = "streamflow.json"
"""Optional file of a checkpoint with what its configs do not hold: recommended steps, guidance, limits, its flow."""

_TEXTS = {".json", ".txt", ".model"}
_OF_TENSORS = ("t5_tokens", "evaluates_data", "default_size", "max_width", "max_height")
"""Recommendations that change what networks are made of or fed."""


@dataclass(frozen=True)
class Checkpoint:
    """A model to serve, as its operator names it.

    Attributes:
        folder: in diffusers layout.
        label: the name that clients use; empty = the folder's name.
        flow: what the weights were distilled to, where the folder cannot tell; see families/flows.py.
        unet_delta: weights that are added to those of the denoising network (PeRFlow); None = none.
        tiny_vae: a folder with a tiny autoencoder, in place of the checkpoint's own `tiny_vae`; None = that.
        adapters, controls: LoRA files and ControlNet folders, by the names that requests use.
        allow_pickle: weights may be in formats that can run code when they are read.
        digests: a file in which digests of weights are kept, so that they are computed once; None = nowhere.
    """

    folder: Path
    label: str = ""
    flow: str = "auto"
    unet_delta: Path | None = None
    tiny_vae: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    controls: Mapping[str, Path] = field(default_factory=dict)
    allow_pickle: bool = False
    digests: Path | None = None

    @classmethod
    def of(cls, source: Checkpoint | Path | str, label: str = "") -> Checkpoint:
        """Args: source: a checkpoint as it is, or a folder."""
        return source if isinstance(source, Checkpoint) else cls(Path(source), label)

    @property
    def name(self) -> str:
        return self.label or self.folder.resolve().name

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """Which classes its parts are of."""
        return read_json(self.folder, "model_index.json")

    @cached_property
    def recommended(self) -> Mapping[str, Any]:
        """The settings in `streamflow.json`; empty without that file."""
        return read_json(self.folder, RECOMMENDED) if (self.folder / RECOMMENDED).exists() else {}

    def config(self, part: str) -> Mapping[str, Any]:
        """Of a network of the checkpoint. Raises InvalidRequestError."""
        return read_json(self.folder, f"{part}/config.json")

    def has(self, part: str) -> bool:
        """Whether there is such a part: in the folder, and not declared absent."""
        return (self.folder / part).is_dir() and self.index.get(part) != [None, None]

    def class_of(self, part: str, default: str) -> str:
        """The class that `model_index.json` names for a part."""
        named = self.index.get(part)
        return named[1] if isinstance(named, list) and len(named) == 2 and named[1] else default

    @cached_property
    def tiny_folder(self) -> Path | None:
        """Where the tiny autoencoder is; None = there is none."""
        if self.tiny_vae is not None:
            return self.tiny_vae
        return self.folder / "tiny_vae" if (self.folder / "tiny_vae").is_dir() else None

    def weights_revision(self, parts: Iterable[str], *, flow: str = "") -> str:
        """A hash of the configs and weights of these parts, and of what is done with them: 16 hex digits.

        Graphs and engines are made of these; adapters and ControlNets are not in it.

        Args:
            flow: as which they are served, unless that is what the folder says.
        """
        digest = hashlib.sha256()
        for name, path in self._files(parts):
            digest.update(name.encode() + b"\0" + bytes.fromhex(self._digest(path)))
        said = {name: self.recommended[name] for name in _OF_TENSORS if name in self.recommended}
        digest.update(flow.encode() + (json.dumps(said, sort_keys=True).encode() if said else b""))
        return digest.hexdigest()[:16]

    def revision(self, weights: str) -> str:
        """A hash of `weights_revision` and of what requests may add to the weights."""
        kinds = {"adapters": self.adapters, "controls": self.controls}
        added = [(kind, name, path) for kind, named in kinds.items() for name, path in sorted(named.items())]
        if not added:
            return weights
        digest = hashlib.sha256(weights.encode())
        for kind, name, path in added:
            for file in loaded_files(path):
                about = f"{kind}\0{name}\0{'' if file == path else file.relative_to(path).as_posix()}\0"
                digest.update(about.encode() + bytes.fromhex(self._digest(file)))
        return digest.hexdigest()[:16]

    def _files(self, parts: Iterable[str]) -> Iterator[tuple[str, Path]]:
        for part in sorted(parts):
            folder = (self.tiny_folder or self.folder / part) if part == "tiny_vae" else self.folder / part
            for path in loaded_files(folder):
                yield f"{part}/{path.relative_to(folder).as_posix()}", path
        if self.unet_delta is not None:
            for path in loaded_files(self.unet_delta):
                yield "unet_delta", path

    def _digest(self, path: Path) -> str:
        """SHA-256 of a file, remembered until its size or time changes."""
        about = path.stat()
        key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
        if key not in _DIGESTS:
            written = _read_digests(self.digests)
            _DIGESTS[key] = written.get(key) or _sha256(path)
            # Small files are read as fast as looked up.
            if key not in written and about.st_size > 2**20:
                _write_digests(self.digests, {**written, key: _DIGESTS[key]})
        return _DIGESTS[key]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder / name`.

    Raises:
        InvalidRequestError: it is missing or broken; the message names the part.
    """
    path = folder / name
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequestError("model", folder, f"a checkpoint folder in diffusers layout, with {name}") from error
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
