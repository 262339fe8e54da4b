"""Exported graphs on ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamflow.backends.lanes import Call, Lanes
from streamflow.backends.runtime import available_cores
from streamflow.errors import InvalidRequestError, UnavailableError, install


class OnnxRuntimeRunner:
    """One graph in a session of its own.

    Args:
        path: of the graph.
        threads: of one call; 0 = all cores.

    Raises:
        UnavailableError: ONNX Runtime is not installed.
        InvalidRequestError: the graph cannot be read.
    """

    name = "onnxruntime"
    row_invariant = True
    row_counts = None

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            message = f"onnxruntime cannot be used ({error}); {install('onnxruntime')}"
            raise UnavailableError(message) from None

        def call(threads: int) -> Call:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # Threads that wait would spin, and take cores from whoever works: another part, another service.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            # What only repeats that an operator runs on the CPU.
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            return lambda feed: session.run(None, feed)[0]

        cores = threads or available_cores()
        try:
            narrow = call(1)
            self._call = Lanes(call(cores) if cores > 1 else narrow, [narrow] * cores)
        except Exception as error:
            # It raises classes of its own that share no base.
            reason = " ".join(str(error).split())[:300]
            raise InvalidRequestError("graph", str(path), "an ONNX graph that ONNX Runtime can load", reason) from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        # Both ways without a copy: arrays and tensors share their memory.
        feed = {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(self._call(feed))
