"""TensorRT engines on a GPU: buffers that stay, one stream, and a CUDA graph for every shape.

Engines are built elsewhere; what is called here is what the lean runtime has too, so that it suffices to serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from streamflow.backends.engine_cache import Built, Platform
from streamflow.backends.parts import Part
from streamflow.errors import InvalidRequestError, UnavailableError, install

BINDINGS = ("tensorrt", "tensorrt_lean")
"""The full library, or its lean runtime."""

_Shapes = tuple[tuple[int, ...], ...]


def load_bindings() -> Any:
    """Raises UnavailableError where neither can be used."""
    reasons = []
    for name in BINDINGS:
        try:
            return import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    why = ", ".join(reasons)
    raise UnavailableError(f"TensorRT cannot be used ({why}); {install('tensorrt')}")


def platform(device: torch.device) -> Platform:
    """What engines must have been built for to run here. Raises UnavailableError without TensorRT."""
    major, minor = torch.cuda.get_device_capability(device)
    return Platform(load_bindings().__version__, f"{major}.{minor}")


@dataclass(frozen=True, slots=True)
class _Bound:
    """A context with buffers of one set of shapes, and the call captured as a CUDA graph."""

    context: Any
    inputs: Mapping[str, Tensor]
    output: Tensor
    graph: torch.cuda.CUDAGraph


class TensorRtRunner:
    """One engine; calls return at once, and whatever uses their result on the current stream waits for it.

    Args:
        built: the serialized engine.
        part: what it was built from.
        device: the GPU for which it was built.

    Raises:
        UnavailableError: TensorRT is not installed.
        InvalidRequestError: the engine cannot be loaded here.
    """

    name = "tensorrt"
    row_invariant = False

    def __init__(self, built: Built, part: Part, *, device: torch.device) -> None:
        self._trt, self._part, self._device = load_bindings(), part, device
        with torch.cuda.device(device):
            self._load(built)

    def _load(self, built: Built) -> None:
        self.row_counts = built.profiles.rows
        # Kept: an engine must not outlive its runtime.
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        # Engines that later versions can run carry code of their own; all that is loaded was checked by its digest.
        self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(built.path.read_bytes())
        if self._engine is None:
            allowed = f"one for TensorRT {self._trt.__version__} and this GPU"
            raise InvalidRequestError("engine", str(built.path), allowed, "`streamflow engine build`")
        self._profiles = {
            tuple(shapes.values()): number for number, shapes in enumerate(built.profiles.shapes(self._part))
        }
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._bound: dict[_Shapes, _Bound] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Raises InvalidRequestError for a size that the engine does not take."""
        rows, most = len(inputs[next(iter(self._part.inputs))]), self.row_counts[-1]
        if rows <= most:
            # Engines, streams and captures are those of the thread's own device.
            with torch.cuda.device(self._device):
                return self._call(inputs, rows)
        parts = [slice(first, first + most) for first in range(0, rows, most)]
        return torch.cat([self({name: rows[part] for name, rows in inputs.items()}) for part in parts])

    def _call(self, inputs: Mapping[str, Tensor], rows: int) -> Tensor:
        padded = next(count for count in self.row_counts if count >= rows)
        shapes = tuple((padded, *inputs[name].shape[1:]) for name in self._part.inputs)
        caller = torch.cuda.current_stream(self._device)
        if torch.cuda.is_current_stream_capturing():
            # This call becomes a part of somebody's greater graph, who has made it outside of that before.
            bound = self._bound[shapes]
            return _through(bound, inputs, rows, partial(self._execute, bound.context, caller))
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            bound = self._bound.get(shapes) or self._bind(shapes)
            output = _through(bound, inputs, rows, bound.graph.replay)
        caller.wait_stream(self._stream)
        output.record_stream(caller)
        return output

    def _bind(self, shapes: _Shapes) -> _Bound:
        if shapes not in self._profiles:
            given = ", ".join("x".join(map(str, shape)) for shape in shapes)
            allowed = f"the sizes for which {self._part.name} was built"
            raise InvalidRequestError("shape", given, allowed, "`streamflow engine build --size` adds more")
        context = self._engine.create_execution_context()
        context.set_optimization_profile_async(self._profiles[shapes], self._stream.cuda_stream)
        buffers: dict[str, Tensor] = {}
        for name, shape in zip(self._part.inputs, shapes, strict=True):
            context.set_input_shape(name, shape)
            buffers[name] = self._buffer(name, shape)
        output = self._buffer(self._part.output, tuple(context.get_tensor_shape(self._part.output)))
        for name, buffer in {**buffers, self._part.output: output}.items():
            context.set_tensor_address(name, buffer.data_ptr())
        # Once outside of the capture: the first call of a shape allocates.
        self._execute(context, self._stream)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._execute(context, self._stream)
        bound = self._bound[shapes] = _Bound(context, buffers, output, graph)
        return bound

    def _execute(self, context: Any, stream: torch.cuda.Stream) -> None:
        if not context.execute_async_v3(stream.cuda_stream):
            raise UnavailableError(f"{self._part.name}: TensorRT did not take the call; its log says why")

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        dtypes = {
            self._trt.DataType.FLOAT: torch.float32,
            self._trt.DataType.HALF: torch.float16,
            self._trt.DataType.BF16: torch.bfloat16,
            self._trt.DataType.INT64: torch.int64,
            self._trt.DataType.INT32: torch.int32,
        }
        return torch.zeros(shape, dtype=dtypes[self._engine.get_tensor_dtype(name)], device=self._device)


def _through(bound: _Bound, inputs: Mapping[str, Tensor], rows: int, launch: Callable[[], None]) -> Tensor:
    """Inputs to their buffers, the call, and a copy of what came out, which is the caller's own."""
    for name, buffer in bound.inputs.items():
        # What padding computes of an earlier call's rows nobody reads.
        buffer[:rows].copy_(inputs[name], non_blocking=True)
    launch()
    return bound.output[:rows].to(torch.float32, copy=True)
