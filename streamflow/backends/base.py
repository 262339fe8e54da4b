"""What runs a network, seen from the running batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Network(Protocol):
    """A velocity network or a refiner; a torch module, an ONNX session and a TensorRT engine look the same from here.

    Attributes:
        name: of the backend, such as "torch-eager".
        row_counts: pad every call to one of these, rising, 2 or more at the end; None = any. What it was compiled for,
            or a single one, so that where it is not row-invariant a row has the same bits nevertheless.
        row_invariant: whether a row's output has the same bits whatever the other rows are and however many.
        takes_velocity: a refiner, which sees the last velocity behind the latents: float32 [rows, 2 C, H, W].
        guided_channels: guidance acts on so many channels, from the first; the others are those of the conditional
            output. None = on all.
    """

    name: str
    row_counts: tuple[int, ...] | None
    row_invariant: bool
    takes_velocity: bool
    guided_channels: int | None

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Evaluates every row at its own timestep.

        Args:
            latents: float32 [rows, C, H, W].
            timestep: float32 [rows].
            conditioning: named tensors [rows, ...].

        Returns:
            float32 [rows, C, H, W].
        """
        ...
