"""Parts as plain torch modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from streamflow.backends.parts import Part, PartModule


class TorchRunner:
    """A part as it was written, on a CPU or a GPU.

    Args:
        device, dtype: where, and in which precision it computes.
    """

    name = "torch-eager"
    # Kernels are chosen by the number of rows, and sum in other orders.
    row_invariant = False
    row_counts = None

    def __init__(self, part: Part, *, device: torch.device, dtype: torch.dtype) -> None:
        self._names = tuple(part.inputs)
        self._module = PartModule(part, device=device, dtype=dtype)
        self._about = f"{part.name}, {device}, {dtype}"

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self._module(*(inputs[name] for name in self._names))
        return output

    def __repr__(self) -> str:
        return f"TorchRunner({self._about})"
