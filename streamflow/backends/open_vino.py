"""Exported graphs on OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamflow.backends.lanes import Call, Lanes
from streamflow.backends.runtime import available_cores
from streamflow.errors import InvalidRequestError, UnavailableError, install

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class OpenVinoRunner:
    """One graph, compiled for one call on all cores and for calls on one core each.

    Args:
        path: of the graph, in float32.
        threads: of one call; 0 = all cores.
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
        except ImportError as error:
            message = f"openvino cannot be used ({error}); {install('openvino')}"
            raise UnavailableError(message) from None
        if dtype is torch.bfloat16 and not has_bfloat16():
            # OpenVINO would compute in float32 without a word.
            raise InvalidRequestError("dtype", "bfloat16", "float32 on this processor, which has no bfloat16")
        core, cores = openvino.Core(), threads or available_cores()

        def calls(streams: int) -> list[Call]:
            settings = {
                "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
                "INFERENCE_NUM_THREADS": cores,
                "NUM_STREAMS": streams,
            }
            compiled = core.compile_model(path, "CPU", settings)
            return [_call(compiled.create_infer_request()) for _ in range(streams)]

        try:
            [wide] = calls(1)
            self._call = Lanes(wide, calls(cores) if cores > 1 else [wide])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InvalidRequestError("graph", str(path), "an ONNX graph that OpenVINO can load", reason) from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        feed = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(self._call(feed))


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16, as far as OpenVINO knows, which must be installed."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _call(request: Any) -> Call:
    # Outputs are copied from the request's own memory, which the next call writes anew; inputs need no copy.
    return lambda feed: request.infer(feed, share_inputs=True, share_outputs=False)[0]
