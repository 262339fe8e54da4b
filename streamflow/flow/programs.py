"""Programs: a sampler compiled to a table with one row per network evaluation.

Everything that a sampler does between two evaluations is linear in the state, so it needs no code in the loop. An
image's state is its latents `x`, a cached velocity `c` and the index of its op; fixed for its life are the clean source
latents `z0` (0 without a source), the initial noise `n0` and a mask. One op is

    y  = i_x x + i_c c + i_z z0 + i_n n             what the network sees; n is this op's draw
    o  = NET(y, timestep, conditioning[, c])        guided; a refiner sees c as well
    x <- p_x x + p_c c + p_o o + p_z z0 + p_n n     from the old c
    c <- g_c c + g_o o
    x <- m x + (1 - m) (k_z z0 + k_n n0)            where there is a mask m: put back where it is 0
    c <- c + k_c (1 - m) (n0 - z0 - c)              likewise; k_c is 0 or 1
    preview ~ v_y y + v_c c + v_o o                 the data that this op expects, from the old c

with coefficients per image, so that any mix of samplers, schedules and step counts is one vectorised update. At the
start `x = start_z z0 + start_n n0` and `c = n0 - z0`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Flag, IntEnum, auto
from functools import cached_property

import numpy as np

BASE, REFINER = "base", "refiner"
"""Names of networks."""


class Role(IntEnum):
    """Which text a row is conditioned on; the value is its place in a slot."""

    TARGET = 0
    NEGATIVE = 1
    SOURCE = 2


class Term(Flag):
    """Parts of an op's formulas that many ops do without."""

    INPUT = auto()  # y is not x
    VELOCITY = auto()  # the old c is used
    SOURCE = auto()
    DRAW = auto()
    GUIDED = auto()
    MASK = auto()
    PREVIEW = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One row of a program: the coefficients above, and what is evaluated.

    Attributes:
        name: of the op, such as "E" for Euler.
        step: index of the schedule's step that it belongs to.
        sigma: where the latents stand after the op.
        timestep: what the network is fed.
        network: BASE or REFINER.
        role: the conditioning.
        guidance_scale: 1 or less runs the row of `role` alone, more one with the negative conditioning beside it.
        draw: number of the noise `n`, where the op uses one.
    """

    name: str
    step: int
    sigma: float
    timestep: float
    network: str = BASE
    role: Role = Role.TARGET
    guidance_scale: float = 1.0
    draw: int | None = None
    i_x: float = 1.0
    i_c: float = 0.0
    i_z: float = 0.0
    i_n: float = 0.0
    p_x: float = 1.0
    p_c: float = 0.0
    p_o: float = 0.0
    p_z: float = 0.0
    p_n: float = 0.0
    g_c: float = 0.0
    g_o: float = 0.0
    k_z: float = 0.0
    k_n: float = 0.0
    k_c: float = 1.0
    v_y: float = 1.0
    v_c: float = 0.0
    v_o: float = 0.0

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """Of the network call."""
        return 2 if self.guided else 1

    @property
    def terms(self) -> Term:
        """What its coefficients need."""
        needs = {
            Term.INPUT: (self.i_x, self.i_c, self.i_z, self.i_n) != (1, 0, 0, 0),
            Term.VELOCITY: any((self.i_c, self.p_c, self.g_c, self.v_c)),
            Term.SOURCE: any((self.i_z, self.p_z)),
            Term.DRAW: any((self.i_n, self.p_n)),
            Term.GUIDED: self.guided,
        }
        return Term(sum(term.value for term, needed in needs.items() if needed))


COLUMNS = (*(f.name for f in fields(Op) if f.name[1:2] == "_"), "timestep", "guidance_scale")
"""The numbers of an op in the order of `Program.coefficients`."""


@dataclass(frozen=True)
class Program:
    """What one image will do.

    Attributes:
        ops: at least one.
        start_z, start_n: the latents begin as `start_z z0 + start_n n0`; 0 and 1 without a source.
        warnings: sentences for the user, such as that a step is longer than the refiner was trained for.
    """

    ops: tuple[Op, ...]
    start_z: float = 0.0
    start_n: float = 1.0
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Network evaluations."""
        return len(self.ops)

    @property
    def rows(self) -> int:
        """Network rows over all ops: what the image costs, up to the size of a row."""
        return sum(op.rows for op in self.ops)

    @property
    def roles(self) -> frozenset[Role]:
        """The conditionings that it needs."""
        guided = {Role.NEGATIVE} if any(op.guided for op in self.ops) else set()
        return frozenset({op.role for op in self.ops} | guided)

    @cached_property
    def coefficients(self) -> np.ndarray:
        """float64 [ops, len(COLUMNS)]."""
        return np.array([[getattr(op, name) for name in COLUMNS] for op in self.ops], dtype=np.float64)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """Per op."""
        return tuple(op.terms for op in self.ops)

    def __str__(self) -> str:
        """The table, one line per op; columns that never vary from their default are left out."""
        defaults = {f.name: f.default for f in fields(Op)}
        shown = [n for n in COLUMNS if n == "timestep" or any(getattr(op, n) != defaults[n] for op in self.ops)]
        head = f"{'step':>4} {'op':>4} {'network':<8} {'on':<8}" + "".join(f"{name:>15}" for name in shown)
        return "\n".join([head, *(self._line(op, shown) for op in self.ops)])

    @staticmethod
    def _line(op: Op, shown: list[str]) -> str:
        names = f"{op.step + 1:>4} {op.name:>4} {op.network:<8} {op.role.name.lower():<8}"
        return names + "".join(f"{getattr(op, name):>15.6f}" for name in shown)
