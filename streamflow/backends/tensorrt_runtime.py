"""TensorRT engines on a GPU: buffers that stay, one stream, and a CUDA graph for every shape.

Engines are built elsewhere; what is called here is what the lean runtime has too, so that it suffices to serve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamflow.backends.parts import Part
from streamflow.errors import InvalidRequestError, UnavailableError

BINDINGS = ("tensorrt", "tensorrt_lean")
"""The full library, or its lean runtime."""

Shapes = tuple[tuple[int, ...], ...]


def load_bindings() -> Any:
    """Raises UnavailableError where neither is installed."""
    for name in BINDINGS:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise UnavailableError("TensorRT is missing; install it with: pip install 'streamflow[tensorrt]'")


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
        path: of the serialized engine.
        part: what it was built from.
        device: the GPU for which it was built.

    Raises:
        UnavailableError: TensorRT is not installed.
        InvalidRequestError: the engine cannot be loaded here.
    """

    name = "tensorrt"
    row_invariant = False

    def __init__(self, path: Path, part: Part, *, device: torch.device) -> None:
        self._trt, self._part, self._device = load_bindings(), part, device
        # Kept: an engine must not outlive its runtime.
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise InvalidRequestError("engine", str(path), f"one for TensorRT {self._trt.__version__} and this GPU")
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._contexts: dict[int, Any] = {}
        self._bound: dict[Shapes, _Bound] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Raises InvalidRequestError for shapes that no profile of the engine takes."""
        shapes = tuple(tuple(inputs[name].shape) for name in self._part.inputs)
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            bound = self._bound.get(shapes) or self._bind(shapes)
            for name, buffer in bound.inputs.items():
                buffer.copy_(inputs[name], non_blocking=True)
            bound.graph.replay()
            output = bound.output.to(torch.float32, copy=True)
        caller.wait_stream(self._stream)
        output.record_stream(caller)
        return output

    def _bind(self, shapes: Shapes) -> _Bound:
        context = self._context(self._profile(shapes))
        buffers: dict[str, Tensor] = {}
        for name, shape in zip(self._part.inputs, shapes, strict=True):
            context.set_input_shape(name, shape)
            buffers[name] = self._buffer(name, shape)
        output = self._buffer(self._part.output, tuple(context.get_tensor_shape(self._part.output)))
        for name, buffer in {**buffers, self._part.output: output}.items():
            context.set_tensor_address(name, buffer.data_ptr())
        # Once outside of the capture: the first call of a shape allocates.
        self._execute(context)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._execute(context)
        bound = self._bound[shapes] = _Bound(context, buffers, output, graph)
        return bound

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise UnavailableError(f"{self._part.name}: TensorRT did not take the call; its log says why")

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(profile, self._stream.cuda_stream)
            self._contexts[profile] = context
        return self._contexts[profile]

    def _profile(self, shapes: Shapes) -> int:
        """The first profile that takes these shapes; they are in the order of their rows."""
        for number in range(self._engine.num_optimization_profiles):
            if all(self._takes(number, name, shape) for name, shape in zip(self._part.inputs, shapes, strict=True)):
                return number
        given = ", ".join("x".join(map(str, shape)) for shape in shapes)
        raise InvalidRequestError("shape", given, f"what {self._part.name} was built for; `streamflow engine build`")

    def _takes(self, number: int, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, number)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        dtypes = {
            self._trt.DataType.FLOAT: torch.float32,
            self._trt.DataType.HALF: torch.float16,
            self._trt.DataType.BF16: torch.bfloat16,
            self._trt.DataType.INT64: torch.int64,
            self._trt.DataType.INT32: torch.int32,
        }
        return torch.empty(shape, dtype=dtypes[self._engine.get_tensor_dtype(name)], device=self._device)
