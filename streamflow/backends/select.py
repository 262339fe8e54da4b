"""Which backend runs a part: the one that was asked for, or the fastest that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from streamflow.backends import tensorrt_build
from streamflow.backends.cost import COSTS, measure, remembered
from streamflow.backends.engine_cache import HEIGHT, WIDTH, EngineCache, Profiles, powers_of_two
from streamflow.backends.graphs import GraphStore
from streamflow.backends.onnx_runtime import OnnxRuntimeRunner
from streamflow.backends.open_vino import OpenVinoRunner
from streamflow.backends.parts import Part, Runner
from streamflow.backends.runtime import available_cores, processor_name, resolve_device, resolve_dtype
from streamflow.backends.tensorrt_runtime import TensorRtRunner, platform
from streamflow.backends.torch_eager import TorchRunner
from streamflow.errors import GenerationError, InvalidRequestError, NotFoundError, StreamFlowError
from streamflow.telemetry import get_logger

AUTO, TORCH, TENSORRT = "auto", "torch", "tensorrt"
ON_CPU = {"onnxruntime": OnnxRuntimeRunner, "openvino": OpenVinoRunner}
"""That run exported graphs on a CPU."""
BACKENDS = (AUTO, TENSORRT, TORCH, *ON_CPU)

_MOST_ERROR = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
_MOST_ROWS = 8
_BUDGET_S = 10.0

_log = get_logger(__name__)


def open_parts(
    device: str = "auto",
    dtype: str = "auto",
    *,
    backend: str = AUTO,
    engines: Path | None = None,
    threads: int = 0,
    rows: int = _MOST_ROWS,
    make_engines: bool = False,
    measured: bool = True,
) -> Opener:
    """By what users write.

    Args:
        engines: where exported graphs and engines are; None = nowhere.
        rows, make_engines, measured: see Opener.

    Raises:
        InvalidRequestError: one of them does not exist, or not together.
    """
    where = resolve_device(device)
    store = None if engines is None else GraphStore(engines)
    return Opener(backend, where, resolve_dtype(dtype, where), store, threads, rows, make_engines, measured)


@dataclass(frozen=True, slots=True)
class Opener:
    """Opens parts on one device; it is an `OpenPart`.

    Args:
        backend: one of `BACKENDS`; auto takes what runs graphs or engines where one is there, and torch otherwise.
        dtype: in which it computes.
        threads: of one call; 0 = all.
        rows: that an engine must take in one call.
        make_engines: graphs and engines that are not there are made, which takes minutes.
        measured: auto takes what is faster here; else the first of `ON_CPU` that is there, so that all replicas take
            the same one.

    Raises:
        InvalidRequestError: a backend that there is not, or not on this device.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype
    store: GraphStore | None = None
    threads: int = 0
    rows: int = _MOST_ROWS
    make_engines: bool = False
    measured: bool = True

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InvalidRequestError("backend", self.backend, ", ".join(BACKENDS))
        if self.backend not in (AUTO, TORCH, *self._others()):
            allowed = ", ".join((AUTO, TORCH, *self._others()))
            where = "cpu" if self.backend in ON_CPU else "cuda"
            raise InvalidRequestError("backend", f"{self.backend} on {self.device}", allowed, f"or --device {where}")

    def __call__(self, part: Part) -> Runner:
        """Raises NotFoundError without the graph or engine that it needs, UnavailableError without its library,
        InvalidRequestError for a precision that the backend lacks, GenerationError when it does not pass its test.
        """
        precision = part.precision(self.dtype)
        if precision is not self.dtype:
            return replace(self, dtype=precision)(part)
        if self.backend == AUTO:
            return self._fastest(part)
        return self._torch(part) if self.backend == TORCH else self._tested(part, self.backend)

    def _others(self) -> Sequence[str]:
        """Backends besides torch that this device has."""
        return {"cuda": (TENSORRT,), "cpu": tuple(ON_CPU)}.get(self.device.type, ())

    def _fastest(self, part: Part) -> Runner:
        reasons = []
        names = [name for name in self._others() if name not in ON_CPU or find_spec(name) is not None]
        for name in self._by_speed(part, names) if len(names) > 1 and self.measured else names:
            try:
                return self._tested(part, name)
            except StreamFlowError as error:
                reasons.append(str(error))
                _log.info("backend refused", part=part.name, backend=name, why=str(error))
        why = "; ".join(dict.fromkeys(reasons)) or "no other runtime is installed"
        _log.info("backend", part=part.name, backend=TORCH, why=why)
        return self._torch(part)

    def _by_speed(self, part: Part, names: Sequence[str]) -> Sequence[str]:
        """The fastest first, by calls with a row for each core; measured once on a machine."""
        if self.store is None:
            return names
        cores = self.threads or available_cores()
        rows, example = min(self.rows, cores), part.example(min(self.rows, cores))

        def measured() -> Sequence[float]:
            runners = {name: self._tested(part, name) for name in names}
            return list(measure(lambda name: _run(runners[name], example), names, budget_s=_BUDGET_S).values())

        versions = ", ".join(f"{name} {version(name)}" for name in names)
        about = (f"{part.name} on {versions}", processor_name(self.device), self.dtype, f"{cores} threads")
        path = self.store.folder / part.revision / COSTS
        try:
            seconds = remembered(path, ", ".join(map(str, about)), measured, count=len(names))
        except StreamFlowError:
            # Whichever it is will be asked again, and say why it is not taken.
            return names
        ranked = [name for _, name in sorted(zip(seconds, names, strict=True))]
        figures = {name: f"{1000 * second:.1f} ms" for name, second in zip(names, seconds, strict=True)}
        _log.info("fastest backend", part=part.name, backend=ranked[0], rows=rows, **figures)
        return ranked

    def _torch(self, part: Part) -> Runner:
        return TorchRunner(part, device=self.device, dtype=self.dtype)

    def _tested(self, part: Part, name: str) -> Runner:
        """A runner of a graph or an engine that has passed the graph's own test."""
        if self.store is None:
            raise NotFoundError(f"{part.name}: no folder for graphs was given (engines)")
        # Engines are built from graphs of their own precision, the CPU runtimes convert while they load.
        exported = self.dtype if name == TENSORRT else torch.float32
        cores = self.threads or available_cores() if name in ON_CPU else 1
        try:
            runner = self._open(part, name, self.store)
            tested = self.store.test(part, runner, exported, cores=cores)
        except StreamFlowError:
            raise
        except Exception as error:
            # Runtimes raise classes of their own that share no base.
            reason = " ".join(str(error).split())[:300]
            raise GenerationError(f"{part.name}: {name} failed: {type(error).__name__}: {reason}") from error
        most = _MOST_ERROR[self.dtype]
        if not tested.error <= most:
            raise GenerationError(f"{part.name}: {name} is off by {tested.error:.1e} of torch, more than {most:g}")
        runner.row_invariant = tested.row_invariant
        _log.info(
            "backend", part=part.name, backend=name, error=f"{tested.error:.1e}", row_invariant=tested.row_invariant
        )
        return runner

    def _open(self, part: Part, name: str, store: GraphStore) -> Runner:
        if name == TENSORRT:
            cache, wanted = EngineCache(store, platform(self.device), dtype=self.dtype), self._wanted(part)
            try:
                built = cache.find(part, wanted)
            except NotFoundError:
                if not self.make_engines:
                    raise
                _log.info("building an engine", part=part.name, rows=self.rows)
                built = cache.make(part, Profiles(powers_of_two(self.rows), wanted.sizes), tensorrt_build.build)
            return TensorRtRunner(built, part, device=self.device)
        if self.make_engines:
            _log.info("exporting, unless it is there", part=part.name)
            store.make(part)
        path = store.find(part)
        if name == "openvino":
            return OpenVinoRunner(path, threads=self.threads, dtype=self.dtype)
        if self.dtype is not torch.float32:
            given = str(self.dtype).removeprefix("torch.")
            raise InvalidRequestError("dtype", given, "float32 with onnxruntime", "openvino takes bfloat16")
        return OnnxRuntimeRunner(path, threads=self.threads)

    def _wanted(self, part: Part) -> Profiles:
        """The model's own size; others are served where the engine takes them."""
        size = (part.sizes.get(HEIGHT, 0) * part.unit_px, part.sizes.get(WIDTH, 0) * part.unit_px)
        return Profiles((self.rows,), (size,))


def leave_cores(backends: str) -> None:
    """Sets torch to one CPU thread where a runtime of graphs does the work.

    Torch's threads spin for a while after each operation that they share, and take the cores from the runtime's.

    Args:
        backends: of a stage or of several, as stages name them.
    """
    if set(backends.split(", ")) <= ON_CPU.keys():
        torch.set_num_threads(1)


def _run(runner: Runner, inputs: Mapping[str, torch.Tensor]) -> None:
    runner(inputs)
