"""Schedules: the sigmas that one image's trajectory passes.

`sigma` is 1 for pure noise and 0 for data, `x_sigma = (1 - sigma) * x0 + sigma * noise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """The sigmas of one trajectory.

    Attributes:
        sigmas: float64 [num_steps + 1], strictly falling; the last is 0.
    """

    sigmas: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Moves steps towards the noise for `shift > 1` (static shift of Stable Diffusion 3, eq. 23 of its paper)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def rectified_flow_schedule(num_steps: int, *, shift: float = 1.0) -> Schedule:
    """`1, 1 - 1/N, ..., 1/N, 0`, shifted."""
    # The arithmetic of 1 - i/N in float64, as users of the reference pipeline write it.
    sigmas = torch.tensor([1 - i / num_steps for i in range(num_steps)] + [0.0], dtype=torch.float64)
    return Schedule(shift_sigmas(sigmas, shift))
