"""Checkpoint folders in diffusers layout: their configs, and the revision of their weights. Without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from streamflow.families.advice import read_advice
from streamflow.families.files import digest_of, loaded_files, read_json

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
        """What `streamflow.json` says; empty without that file. Raises InvalidRequestError."""
        return read_advice(self.folder)

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
            digest.update(name.encode() + b"\0" + bytes.fromhex(digest_of(path, self.digests)))
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
                digest.update(about.encode() + bytes.fromhex(digest_of(file, self.digests)))
        return digest.hexdigest()[:16]

    def _files(self, parts: Iterable[str]) -> Iterator[tuple[str, Path]]:
        for part in sorted(parts):
            folder = (self.tiny_folder or self.folder / part) if part == "tiny_vae" else self.folder / part
            for path in loaded_files(folder):
                yield f"{part}/{path.relative_to(folder).as_posix()}", path
        if self.unet_delta is not None:
            for path in loaded_files(self.unet_delta):
                yield "unet_delta", path
