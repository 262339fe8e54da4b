"""Which backend runs a part: the one that was asked for, or the fastest that is there."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from streamflow.backends.graphs import GraphStore
from streamflow.backends.onnx_runtime import OnnxRuntimeRunner
from streamflow.backends.open_vino import OpenVinoRunner
from streamflow.backends.parts import Part, Runner
from streamflow.backends.runtime import resolve_device, resolve_dtype
from streamflow.backends.torch_eager import TorchRunner
from streamflow.errors import GenerationError, InvalidRequestError, NotFoundError
from streamflow.telemetry import get_logger

AUTO, TORCH = "auto", "torch"
ON_CPU = {"openvino": OpenVinoRunner, "onnxruntime": OnnxRuntimeRunner}
"""That run exported graphs on a CPU, the fastest first."""
BACKENDS = (AUTO, TORCH, *ON_CPU)

_MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}

_log = get_logger(__name__)


def open_parts(
    device: str = "auto", dtype: str = "auto", *, backend: str = AUTO, engines: Path | None = None, threads: int = 0
) -> Opener:
    """By what users write.

    Args:
        engines: where exported graphs are; None = nowhere.

    Raises:
        InvalidRequestError: one of them does not exist, or not together.
    """
    where = resolve_device(device)
    store = None if engines is None else GraphStore(engines)
    return Opener(backend, where, resolve_dtype(dtype, where), store, threads)


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens parts on one device; it is an `OpenPart`.

    Args:
        backend: one of `BACKENDS`; auto takes what runs exported graphs where one is there, and torch otherwise.
        dtype: in which it computes.
        threads: of one call; 0 = all.

    Raises:
        InvalidRequestError: a backend that there is not, or not on this device or in this precision.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype
    store: GraphStore | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InvalidRequestError("backend", self.backend, ", ".join(BACKENDS))
        if self.backend in ON_CPU and self.device.type != "cpu":
            raise InvalidRequestError("backend", f"{self.backend} on {self.device}", "torch there", "or --device cpu")

    def __call__(self, part: Part) -> Runner:
        """Raises NotFoundError without the graph that the backend needs, UnavailableError without its library."""
        if self.backend == TORCH or (self.backend == AUTO and self.device.type != "cpu"):
            return self._torch(part)
        if self.backend != AUTO:
            return self._graph(part, self.backend)
        why = "no runtime for graphs is installed"
        for name in ON_CPU:
            if find_spec(name) is None:
                continue
            try:
                runner = self._graph(part, name)
            except (NotFoundError, InvalidRequestError, GenerationError) as error:
                why = str(error)
                continue
            return runner
        _log.info("backend", part=part.name, backend=TORCH, why=why)
        return self._torch(part)

    def _torch(self, part: Part) -> Runner:
        return TorchRunner(part, device=self.device, dtype=self.dtype)

    def _graph(self, part: Part, name: str) -> Runner:
        if self.store is None:
            raise NotFoundError(f"{part.name}: no folder for graphs was given (engines)")
        path = self.store.find(part)
        runner = self._open(name, path)
        tested = self.store.test(part, runner)
        most = _MOST_ERROR[self.dtype]
        if not tested.error <= most:
            raise GenerationError(f"{part.name}: {name} is off by {tested.error:.1e} of torch, more than {most:g}")
        runner.row_invariant = tested.row_invariant
        _log.info(
            "backend", part=part.name, backend=name, error=f"{tested.error:.1e}", row_invariant=tested.row_invariant
        )
        return runner

    def _open(self, name: str, path: Path) -> Runner:
        if name == "openvino":
            return OpenVinoRunner(path, threads=self.threads, dtype=self.dtype)
        if self.dtype is not torch.float32:
            given = str(self.dtype).removeprefix("torch.")
            raise InvalidRequestError("dtype", given, "float32 with onnxruntime", "openvino takes bfloat16")
        return OnnxRuntimeRunner(path, threads=self.threads)
