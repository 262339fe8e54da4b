"""Networks as plain torch modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""How a family calls its module: (module, latents, timestep, conditioning) -> output."""


class TorchNetwork:
    """A torch module behind the `Network` contract; only what the module is fed has its precision.

    Args:
        module: on its device, in its dtype, in eval mode.
        forward: the family's call.
        row_counts: pad every call to one of these; None = any. One count alone makes the output independent of how
            many rows are asked for, which eager kernels are not.
        takes_velocity: see Network.
    """

    name = "torch-eager"
    row_invariant = False

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        *,
        row_counts: tuple[int, ...] | None = None,
        takes_velocity: bool = False,
    ) -> None:
        # Rather than a mode around each call: a compiled step is traced through here.
        self._module, self._forward = module.requires_grad_(False), forward
        self.row_counts, self.takes_velocity = row_counts, takes_velocity
        self._dtype = next(module.parameters()).dtype

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: _as_dtype(tensor, self._dtype) for name, tensor in conditioning.items()}
        return self._forward(self._module, latents.to(self._dtype), timestep, inputs).float()

    def __repr__(self) -> str:
        return f"TorchNetwork({type(self._module).__name__}, {self._dtype}, row_counts={self.row_counts})"


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
