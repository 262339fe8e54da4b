"""Programs: a sampler compiled to a table with one row per network evaluation.

Everything that a sampler does between two evaluations is linear in the state, so it needs no code in the loop. An
image's state is its latents `x`, a cached velocity `c` and the index of its op; fixed for its life are the clean source
latents `z0` (img2img, inpainting), the initial noise `n0` and a mask. One op is

    y  = i_x x + i_c c + i_z z0 + i_n n             what the network sees; n is this op's draw
    o  = NET(y, timestep, conditioning)             guided
    x <- p_x x + p_c c + p_o o + p_n n              from the old c
    c <- g_c c + g_o o
    x <- k_z z0 + k_n n0;  c <- n0 - z0             outside the mask, where there is one
    preview ~ v_y y + v_o o                         the data that this op expects

with coefficients per image, so that any mix of samplers, schedules and step counts is one vectorised update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from streamflow.flow.schedules import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One row of a program: the coefficients above, and what is evaluated.

    Attributes:
        name: of the step, such as "E" for Euler.
        timestep: what the network is fed.
        sigma: where the latents stand after the op.
        guidance_scale: 1 or less runs the conditional row alone.
        network: "base" or "refiner".
        draw: number of the noise `n`, where the op uses one.
    """

    name: str
    timestep: float
    sigma: float
    guidance_scale: float = 1.0
    network: str = "base"
    draw: int | None = None
    i_x: float = 1.0
    i_c: float = 0.0
    i_z: float = 0.0
    i_n: float = 0.0
    p_x: float = 1.0
    p_c: float = 0.0
    p_o: float = 0.0
    p_n: float = 0.0
    g_c: float = 0.0
    g_o: float = 0.0
    k_z: float = 0.0
    k_n: float = 0.0
    v_y: float = 1.0
    v_o: float = 0.0

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def plain_input(self) -> bool:
        """Whether the network sees the latents as they are."""
        return (self.i_x, self.i_c, self.i_z, self.i_n) == (1, 0, 0, 0)


COLUMNS = (*(f.name for f in fields(Op) if f.name[1:2] == "_"), "timestep", "guidance_scale")
"""The numbers of an op in the order of `Program.coefficients`."""


@dataclass(frozen=True)
class Program:
    """What one image will do.

    Attributes:
        ops: at least one.
        start_z, start_n: the latents begin as `start_z z0 + start_n n0`; 0 and 1 without a source.
    """

    ops: tuple[Op, ...]
    start_z: float = 0.0
    start_n: float = 1.0

    def __len__(self) -> int:
        return len(self.ops)

    @cached_property
    def coefficients(self) -> Tensor:
        """float64 [ops, len(COLUMNS)]."""
        return torch.tensor([[getattr(op, name) for name in COLUMNS] for op in self.ops], dtype=torch.float64)

    def __str__(self) -> str:
        """The table, one line per op; columns that never vary from their default are left out."""
        defaults = {f.name: f.default for f in fields(Op)}
        shown = [n for n in COLUMNS if n == "timestep" or any(getattr(op, n) != defaults[n] for op in self.ops)]
        head = f"{'op':>4} {'net':<8}" + "".join(f"{name:>15}" for name in shown)
        rows = [f"{op.name:>4} {op.network:<8}" + "".join(f"{getattr(op, n):>15.6f}" for n in shown) for op in self.ops]
        return "\n".join([head, *rows])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a family's network means by its input and output.

    Attributes:
        timestep: sigma -> what the network is fed, such as 1000 sigma.
        velocity_sign: +1 where the output is `noise - data`, -1 where it is `data - noise`.
    """

    timestep: Callable[[float], float] = lambda sigma: 1000.0 * sigma
    velocity_sign: float = 1.0


def euler(schedule: Schedule, prediction: Prediction, *, guidance_scale: float, start: int = 0) -> Program:
    """The Euler method on a rectified flow: `x <- x + (sigma' - sigma) u`.

    Args:
        start: index of the first step; above 0 the image starts from its source, noised to that sigma.
    """
    sigmas = schedule.sigmas.tolist()
    sign = prediction.velocity_sign
    ops = tuple(
        Op(
            name="E",
            timestep=prediction.timestep(sigma),
            sigma=after,
            guidance_scale=guidance_scale,
            p_o=sign * (after - sigma),
            g_o=sign,
            k_z=1 - after,
            k_n=after,
            v_o=-sign * sigma,
        )
        for sigma, after in zip(sigmas[start:], sigmas[start + 1 :], strict=False)
    )
    return Program(ops, start_z=1 - sigmas[start] if start else 0.0, start_n=sigmas[start] if start else 1.0)
