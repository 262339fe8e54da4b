"""The definition of a program, written out for one image: what programs.py says, op by op, without the engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from streamflow.flow.programs import REFINER, Op, Program, Role

Evaluate = Callable[[np.ndarray, float, Role], np.ndarray]
"""(y, timestep, role) -> output."""

Refine = Callable[[np.ndarray, np.ndarray, float, Role], np.ndarray]
"""(y, c, timestep, role) -> output."""


def run_program(
    program: Program,
    base: Evaluate,
    noise: np.ndarray,
    *,
    source: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    refiner: Refine | None = None,
    draw: Callable[[int], np.ndarray] = lambda number: np.zeros(1),
    previews: list[np.ndarray] | None = None,
) -> np.ndarray:
    """The final latents, in the dtype of the noise."""
    z0 = np.zeros_like(noise) if source is None else source
    x, c = program.start_z * z0 + program.start_n * noise, noise - z0
    for op in program.ops:
        n = np.zeros_like(noise) if op.draw is None else draw(op.draw)
        y = op.i_x * x + op.i_c * c + op.i_z * z0 + op.i_n * n
        o = _guided(op, base, refiner, y, c)
        if previews is not None:
            previews.append(op.v_y * y + op.v_c * c + op.v_o * o)
        x, c = (
            op.p_x * x + op.p_c * c + op.p_o * o + op.p_z * z0 + op.p_n * n,
            op.g_c * c + op.g_o * o,
        )
        if mask is not None:
            x = mask * x + (1 - mask) * (op.k_z * z0 + op.k_n * noise)
            c = c + op.k_c * (1 - mask) * (noise - z0 - c)
    return x


def _guided(op: Op, base: Evaluate, refiner: Refine | None, y: np.ndarray, c: np.ndarray) -> np.ndarray:
    def evaluate(role: Role) -> np.ndarray:
        if op.network == REFINER:
            assert refiner is not None
            return refiner(y, c, op.timestep, role)
        return base(y, op.timestep, role)

    output = evaluate(op.role)
    if not op.guided:
        return output
    negative = evaluate(Role.NEGATIVE)
    return negative + op.guidance_scale * (output - negative)
