"""Exported graphs on disk, each with a test of its own that runtimes must pass before they serve.

    engines/REVISION/unet.onnx                the graph
                     unet.test.safetensors    inputs of three rows, and what torch makes of them in float32
                     unet.json                see store.py

A graph that is stale, cut or foreign is never used, and the error says why and which command makes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamflow.backends.export import OPSET, export
from streamflow.backends.parts import Part, PartModule, Runner
from streamflow.backends.store import Store, sha256
from streamflow.errors import GenerationError, NotFoundError

TEST_ROWS = 3
_EXPECTED = "expected output"
_FORMAT = 2
_REMEDY = "`streamflow engine export` makes it"


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

    def path(self, part: Part, dtype: torch.dtype = torch.float32) -> Path:
        """Where its graph is, or would be."""
        return self._store(part).folder / f"{_name(part, dtype)}.onnx"

    def make(self, part: Part, dtype: torch.dtype = torch.float32) -> Path:
        """Exports the part, unless that was done; of several processes one does it, and the others wait.

        Args:
            dtype: see `export`.

        Raises:
            UnavailableError: the exporter is not installed, or the folder cannot be written to.
        """
        name = _name(part, dtype)

        def write(folder: Path) -> None:
            export(part, folder / f"{name}.onnx", dtype=dtype)
            save_file(_test(part), folder / f"{name}.test.safetensors")

        self._store(part).make(name, _made_of(part, dtype), write)
        return self.path(part, dtype)

    def find(self, part: Part, dtype: torch.dtype = torch.float32) -> Path:
        """The part's graph, whole and current.

        Raises:
            NotFoundError: there is none, or it is stale, cut or foreign; the message says why.
        """
        self._store(part, dtype).check(_name(part, dtype), _made_of(part, dtype))
        return self.path(part, dtype)

    def digest(self, part: Part, dtype: torch.dtype = torch.float32) -> str:
        """Of the graph: what was built from another one does not fit. Raises NotFoundError."""
        return sha256(self.find(part, dtype))

    def test(self, part: Part, runner: Runner, dtype: torch.dtype = torch.float32, *, cores: int = 1) -> Tested:
        """Runs the graph's own test: rows that differ in all inputs, among them their timesteps.

        Args:
            cores: between which the runner shares rows out; it is asked for several rows on each, too.

        Raises:
            GenerationError: what comes out is not finite, or of another shape.
        """
        try:
            inputs = load_file(self.path(part, dtype).with_suffix(".test.safetensors"))
            expected = inputs.pop(_EXPECTED)
        except (OSError, SafetensorError, KeyError) as error:
            raise NotFoundError(f"{part.name}: its test cannot be read: {error}; {_REMEDY}") from None
        alone = torch.cat(
            [runner({name: rows[k : k + 1] for name, rows in inputs.items()}).cpu() for k in range(TEST_ROWS)]
        )
        most, row_invariant = 0.0, True
        # Alone in a call, a few in one, and several on each core with some left over.
        for count in sorted({1, TEST_ROWS, 2 * cores + 1}):
            order = torch.arange(count) % TEST_ROWS
            together = runner({name: rows[order] for name, rows in inputs.items()}).cpu()
            if together.shape != expected[order].shape or not together.isfinite().all():
                raise GenerationError(f"{part.name}: {runner.name} gives {tuple(together.shape)}, or values not finite")
            most = max(most, (together - expected[order]).abs().max().item())
            row_invariant &= torch.equal(together, alone[order])
        return Tested(most / expected.abs().max().item(), row_invariant)

    def _store(self, part: Part, dtype: torch.dtype = torch.float32) -> Store:
        # Only engines are made of graphs in another precision.
        remedy = _REMEDY if dtype is torch.float32 else "`streamflow engine build` makes it"
        return Store(self.folder / part.revision, kind="graph", remedy=remedy)


def _name(part: Part, dtype: torch.dtype) -> str:
    return part.name if dtype is torch.float32 else f"{part.name}.{_word(dtype)}"


def _made_of(part: Part, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "part": part.name,
        "revision": part.revision,
        "opset": OPSET,
        "dtype": _word(dtype),
        "inputs": {name: list(one.shape) for name, one in part.inputs.items()},
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _test(part: Part) -> dict[str, Tensor]:
    module = PartModule(part, device=torch.device("cpu"), dtype=torch.float32)
    inputs = part.example(TEST_ROWS, seed=1)
    with torch.inference_mode():
        return {**inputs, _EXPECTED: module(*inputs.values()).contiguous()}
