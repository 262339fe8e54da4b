"""Parts as plain torch modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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
        self.part, self.device, self.dtype = part, device, dtype
        self._names = tuple(part.inputs)
        self._module = PartModule(part, device=device, dtype=dtype)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self._module(*(inputs[name] for name in self._names))
        return output

    def __repr__(self) -> str:
        return f"TorchRunner({self.part.name}, {self.device}, {self.dtype})"

    @property
    def module(self) -> nn.Module:
        """The part's own network."""
        return self._module.own

    def using(self, module: nn.Module, **changed: Any) -> TorchRunner:
        """The same part with another network, such as one with other weights.

        Args:
            module: on the same device, in the same precision.
            changed: fields of the part that are others then.
        """
        part = replace(self.part, load=lambda device, dtype: module, **changed)
        return TorchRunner(part, device=self.device, dtype=self.dtype)
