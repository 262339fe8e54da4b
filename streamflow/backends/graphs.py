"""Exported graphs on disk: what each was made of, and whether it still is that.

    engines/REVISION/unet.onnx                the graph
                     unet.test.safetensors    inputs of three rows, and what torch makes of them
                     unet.json                the manifest, written last

A graph that is stale, cut or foreign is never used, and the error says why and which command makes it anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamflow.backends.export import OPSET, export
from streamflow.backends.parts import Part, PartModule, Runner
from streamflow.errors import GenerationError, NotFoundError

TEST_ROWS = 3
_EXPECTED = "expected output"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a graph was made of.

    Attributes:
        inputs: names and shapes, with the names of the axes that vary.
        sha256: of each file, by name.
    """

    format: int
    part: str
    revision: str
    opset: int
    torch: str
    inputs: dict[str, list[int | str]]
    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class Tested:
    """How a runner did on a graph's own test.

    Attributes:
        error: largest difference to torch in float32, relative to its largest value.
        row_invariant: whether each row alone gave the bits that it gave among the others.
    """

    error: float
    row_invariant: bool


class GraphStore:
    """The graphs of any number of checkpoints, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"GraphStore({self.folder})"

    def path(self, part: Part) -> Path:
        """Where its graph is, or would be."""
        return self.folder / part.revision / f"{part.name}.onnx"

    def make(self, part: Part) -> Path:
        """Exports the part, unless that was done; of several processes one does it, and the others wait.

        Raises:
            UnavailableError: the exporter is not installed.
            OSError: the folder cannot be written to.
        """
        path = self.path(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            try:
                return self.find(part)
            except NotFoundError:
                path.with_suffix(".json").unlink(missing_ok=True)
            export(part, path)
            save_file(_test(part), _beside(path, ".test.safetensors"))
            files = [file for file in path.parent.iterdir() if file.name.startswith(f"{part.name}.")]
            manifest = Manifest(
                format=_FORMAT,
                part=part.name,
                revision=part.revision,
                opset=OPSET,
                torch=torch.__version__,
                inputs=_shapes(part),
                sha256={file.name: _sha256(file) for file in files if file.suffix != ".lock"},
            )
            made = path.with_suffix(".json.new")
            made.write_text(json.dumps(asdict(manifest), indent=2) + "\n", "utf-8")
            os.replace(made, path.with_suffix(".json"))
        return path

    def find(self, part: Part) -> Path:
        """The part's graph, whole and current.

        Raises:
            NotFoundError: there is none, or it is stale, cut or foreign; the message says why.
        """
        path = self.path(part)
        try:
            said = json.loads(path.with_suffix(".json").read_text("utf-8"))
            self._check(part, said)
        except FileNotFoundError:
            raise NotFoundError(f"{part.name}: no graph in {path.parent}; {_REMEDY}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise NotFoundError(f"{part.name}: the graph in {path.parent} cannot be used: {error}; {_REMEDY}") from None
        return path

    def test(self, part: Part, runner: Runner) -> Tested:
        """Runs the graph's own test: rows that differ in all inputs, among them their timesteps.

        Raises:
            GenerationError: what comes out is not finite, or of another shape.
        """
        try:
            inputs = load_file(_beside(self.path(part), ".test.safetensors"))
            expected = inputs.pop(_EXPECTED)
        except (OSError, SafetensorError, KeyError) as error:
            raise NotFoundError(f"{part.name}: its test cannot be read: {error}; {_REMEDY}") from None
        together = runner(inputs)
        if together.shape != expected.shape or not together.isfinite().all():
            raise GenerationError(f"{part.name}: {runner.name} gives {tuple(together.shape)}, or values not finite")
        alone = [runner({name: rows[k : k + 1] for name, rows in inputs.items()}) for k in range(TEST_ROWS)]
        off = (together - expected).abs().max() / expected.abs().max()
        return Tested(off.item(), torch.equal(together, torch.cat(alone)))

    def _check(self, part: Part, said: Mapping[str, Any]) -> None:
        """Raises ValueError with what is wrong."""
        expected = {"format": _FORMAT, "part": part.name, "revision": part.revision, "inputs": _shapes(part)}
        for name, value in expected.items():
            if said[name] != value:
                raise ValueError(f"it was made for {name} {said[name]!r}, not {value!r}")
        for name, digest in said["sha256"].items():
            file = self.path(part).parent / name
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            if _sha256(file) != digest:
                raise ValueError(f"{name} is not what was written")


_REMEDY = "`streamflow engine export` makes it"


def _test(part: Part) -> dict[str, Tensor]:
    module = PartModule(part, device=torch.device("cpu"), dtype=torch.float32)
    inputs = part.example(TEST_ROWS, seed=1)
    with torch.inference_mode():
        return {**inputs, _EXPECTED: module(*inputs.values()).contiguous()}


def _shapes(part: Part) -> dict[str, list[int | str]]:
    return {name: list(one.shape) for name, one in part.inputs.items()}


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.stem + suffix)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; it goes with the process."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
