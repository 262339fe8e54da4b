"""Exported graphs on OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamflow.errors import InvalidRequestError, UnavailableError

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVinoRunner:
    """One compiled graph with one inference request.

    Args:
        path: of the graph, in float32.
        threads: of one call; 0 = as OpenVINO chooses.
        dtype: in which it computes: float32, or bfloat16 where the processor has it.

    Raises:
        UnavailableError: OpenVINO is not installed.
        InvalidRequestError: the graph cannot be read, or the precision is one that there is not here.
    """

    name = "openvino"
    row_invariant = True
    row_counts = None

    def __init__(self, path: Path, *, threads: int = 0, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in _PRECISIONS:
            raise InvalidRequestError("dtype", str(dtype).removeprefix("torch."), "float32, bfloat16 with openvino")
        try:
            import openvino
        except ModuleNotFoundError:
            message = "openvino is missing; install it with: pip install 'streamflow[openvino]'"
            raise UnavailableError(message) from None
        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        core = openvino.Core()
        if dtype is torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            # OpenVINO would compute in float32 without a word.
            raise InvalidRequestError("dtype", "bfloat16", "float32 on this processor, which has no bfloat16")
        try:
            self._request = core.compile_model(path, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InvalidRequestError("graph", str(path), "an ONNX graph that OpenVINO can load", reason) from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        feed = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        outputs = self._request.infer(feed, share_inputs=True)
        # Its memory is the request's own, and is written anew by the next call.
        return torch.from_numpy(outputs[0].copy())
