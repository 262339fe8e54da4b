"""Schedules: the sigmas that one image's trajectory passes.

`sigma` is 1 for pure noise and 0 for data, `x_sigma = (1 - sigma) * x0 + sigma * noise`. Without torch, like everything
that a gateway needs in order to judge a request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from streamflow.errors import InvalidRequestError

Sigmas = tuple[float, ...]
"""float64 [steps + 1], falling; the first is 1, the last is 0."""


@dataclass(frozen=True, slots=True)
class DynamicShift:
    """A shift that grows with the image (FLUX): `mu` is linear in the number of packed tokens; the shift is `e^mu`.

    Attributes:
        base_tokens, base_mu, max_tokens, max_mu: two points of the line.
    """

    base_tokens: int = 256
    base_mu: float = 0.5
    max_tokens: int = 4096
    max_mu: float = 1.15

    def shift(self, tokens: int) -> float:
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return math.exp(slope * tokens + self.base_mu - slope * self.base_tokens)


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """How a checkpoint spaces its steps.

    Attributes:
        shift: static shift, or one that depends on the image's size.
        grid: before the shift. "uniform": `1, 1 - 1/N, ..., 1/N`, as pipelines give it that choose their sigmas
            themselves (FLUX, InstaFlow). "to-minimum": evenly from 1 to the sigma of the last training step, which is
            shifted itself; so do pipelines that leave it to the scheduler (SD3).
        train_steps: of the scheduler, for "to-minimum".
    """

    shift: float | DynamicShift = 1.0
    grid: Literal["uniform", "to-minimum"] = "uniform"
    train_steps: int = 1000

    def sigmas(self, steps: int, *, tokens: int = 0, shift: float | None = None) -> Sigmas:
        """Args:
        steps: 1 or more.
        tokens: packed tokens of the image, for a dynamic shift.
        shift: in place of the checkpoint's.
        """
        if shift is None:
            shift = self.shift.shift(tokens) if isinstance(self.shift, DynamicShift) else self.shift
        return (*(shift_sigma(sigma, shift) for sigma in self._grid(steps, shift)), 0.0)

    def _grid(self, steps: int, shift: float) -> list[float]:
        if self.grid == "uniform":
            # The arithmetic of 1 - i/N in float64, as users of the reference pipeline write it.
            return [1 - step / steps for step in range(steps)]
        # A dynamic shift is applied by set_timesteps alone, a static one by the scheduler's constructor as well.
        static = not isinstance(self.shift, DynamicShift)
        least = shift_sigma(1 / self.train_steps, shift) if static else 1 / self.train_steps
        return [1 + (least - 1) * (step / (steps - 1) if steps > 1 else 0.0) for step in range(steps)]


def shift_sigma(sigma: float, shift: float) -> float:
    """Moves steps towards the noise for `shift > 1` (eq. 23 of "Scaling Rectified Flow Transformers", Esser et al.)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def first_step(num_steps: int, strength: float, *, round_up: bool) -> int:
    """The step at which img2img starts, as the reference pipelines of the family count it.

    Args:
        strength: in (0, 1]; 1 runs every step.
        round_up: see FlowSpec.round_up_strength.

    Raises:
        InvalidRequestError: no step would be left.
    """
    # Requests carry float32, in which 0.7 of 10 steps would be 6: all forms count from the same rounded number.
    given, strength = strength, round(strength, 6)
    if not 0 < strength <= 1:
        raise InvalidRequestError("strength", given, "greater than 0, at most 1")
    steps = min(num_steps * strength, num_steps)
    start = int(num_steps - steps) if round_up else num_steps - int(steps)
    if start >= num_steps:
        allowed = f"at least {1 / num_steps:.3g} with {num_steps} steps"
        raise InvalidRequestError("strength", strength, allowed, "raise strength or steps: none would run")
    return start
