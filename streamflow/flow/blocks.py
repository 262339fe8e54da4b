"""The ops of samplers that walk the sigmas of a rectified flow, step by step in blocks.

With `h = sigma' - sigma` and the velocity `u(x, sigma) = d x / d sigma`, one step of each block is

    E  Euler            x += h u(x, sigma)
    H  Heun             d0 = u(x, sigma); d1 = u(x + h d0, sigma'); x += h/2 (d0 + d1)
    P  pseudo corrector the same with d0 = the last velocity that was evaluated: one evaluation
    M  midpoint         d0 = u(x, sigma); x += h u(x + h/2 d0, sigma + h/2)         (RF-Solver, Wang et al.)
    L  FireFlow         the same with d0 = the last velocity: one evaluation        (Deng et al.)
    R  refiner          g = c + r(x, c, sigma); d = g + r(x + h g, g, sigma'); x += h/2 (g + d); c = g

H, P and R are those of FlowTurbo (Zhao et al., section 3), whose configurations such as H2P4R2 are blocks in that
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamflow.flow.guidance import Guidance, GuidanceMode
from streamflow.flow.programs import BASE, REFINER, Op, Role
from streamflow.flow.schedules import Sigmas
from streamflow.flow.spec import FlowSpec

NEEDS_VELOCITY = {"P": "H", "L": "M", "R": "H"}
"""Blocks that go on from the last velocity, and the one that takes their place where there is none yet."""

Blocks = Sequence[str]
"""One letter of the table above per step."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the schedule, from `sigma` to `after`."""

    index: int
    sigma: float
    after: float
    flow: FlowSpec
    guidance: Guidance

    @property
    def h(self) -> float:
        return self.after - self.sigma

    def base(self, name: str, at: float, *, stands: float, p_o: float = 0.0, **coefficients: Any) -> Op:
        """An evaluation of the base network at sigma `at`, whose velocity is cached; `p_o` is the velocity's factor.

        Args:
            stands: where the latents are afterwards.
        """
        sign = self.flow.velocity_sign
        return Op(
            name=name,
            step=self.index,
            sigma=stands,
            timestep=self.flow.timestep(at),
            network=BASE,
            guidance_scale=self.guidance.at(at),
            p_o=sign * p_o,
            **({"g_o": sign, "k_z": 1 - stands, "k_n": stands, "v_o": -sign * at} | coefficients),
        )

    def refine(self, name: str, at: float, *, stands: float, **coefficients: Any) -> Op:
        """An evaluation of the refiner at sigma `at`, which gives the change of the cached velocity."""
        guided = self.flow.refiner is not None and self.flow.refiner.guided
        return Op(
            name=name,
            step=self.index,
            sigma=stands,
            timestep=self.flow.timestep(at),
            network=REFINER,
            guidance_scale=self.guidance.at(at) if guided else 1.0,
            **({"g_c": 1.0, "k_z": 1 - stands, "k_n": stands, "v_c": -at, "v_o": -at} | coefficients),
        )


def euler(step: Step) -> Iterator[Op]:
    yield step.base("E", step.sigma, stands=step.after, p_o=step.h)


def heun(step: Step) -> Iterator[Op]:
    yield step.base("F", step.sigma, stands=step.sigma)
    yield from pseudo_corrector(step)


def pseudo_corrector(step: Step) -> Iterator[Op]:
    yield step.base("C", step.after, stands=step.after, i_c=step.h, p_c=step.h / 2, p_o=step.h / 2)


def midpoint(step: Step) -> Iterator[Op]:
    yield step.base("F", step.sigma, stands=step.sigma)
    yield from fireflow(step)


def fireflow(step: Step) -> Iterator[Op]:
    yield step.base("M", step.sigma + step.h / 2, stands=step.after, i_c=step.h / 2, p_o=step.h)


def refiner(step: Step) -> Iterator[Op]:
    yield step.refine("RF", step.sigma, stands=step.sigma, g_o=1.0)
    yield step.refine("RC", step.after, stands=step.after, i_c=step.h, p_c=step.h, p_o=step.h / 2)


BLOCKS: dict[str, Callable[[Step], Iterator[Op]]] = {
    "E": euler,
    "H": heun,
    "P": pseudo_corrector,
    "M": midpoint,
    "L": fireflow,
    "R": refiner,
}


def compile_blocks(blocks: Blocks, sigmas: Sigmas, flow: FlowSpec, guidance: Guidance, *, first: int) -> list[Op]:
    """The ops of the steps from `first` on; `blocks` has one letter for each of them."""
    steps = _steps(sigmas, flow, guidance, first)
    return [op for block, step in zip(blocks, steps, strict=True) for op in BLOCKS[block](step)]


def spread(blocks: Blocks, count: int) -> list[str]:
    """The blocks of `count` steps in the proportions of `blocks`: what a shorter run does, such as img2img."""
    return [blocks[step * len(blocks) // count] for step in range(count)]


def arrange(blocks: Blocks, *, evaluates_data: bool) -> list[str]:
    """The blocks with a first and a last one that can stand there.

    The first has no velocity to go on from, and the last must not evaluate the data where the network cannot.
    """
    first, *rest = blocks
    arranged = [NEEDS_VELOCITY.get(first, first), *rest]
    if arranged[-1] in "HP" and not evaluates_data:
        arranged[-1] = "E"
    return arranged


def residual_euler(sigmas: Sigmas, flow: FlowSpec, guidance: Guidance, *, first: int) -> list[Op]:
    """Euler steps whose negative velocity is kept in `c` rather than evaluated: residual guidance.

    With the kept velocity q and strength delta the step is `h (g u + (1 - g) delta q)`.
    """
    steps = list(_steps(sigmas, flow, guidance, first))
    once = guidance.mode is GuidanceMode.ONETIME_NEGATIVE
    return [*(_keep_negative(steps[0]) if once else ()), *(op for step in steps for op in _residual_step(step))]


def _keep_negative(step: Step) -> Iterator[Op]:
    sign = step.flow.velocity_sign
    yield Op(
        name="N",
        step=step.index,
        sigma=step.sigma,
        timestep=step.flow.timestep(step.sigma),
        role=Role.NEGATIVE,
        g_o=sign,
        k_z=1 - step.sigma,
        k_n=step.sigma,
        v_o=-sign * step.sigma,
    )


def _residual_step(step: Step) -> Iterator[Op]:
    scale, sign = step.guidance.at(step.sigma), step.flow.velocity_sign
    kept = (1 - scale) * step.guidance.residual
    yield Op(
        name="E",
        step=step.index,
        sigma=step.after,
        timestep=step.flow.timestep(step.sigma),
        p_o=sign * step.h * scale,
        p_c=step.h * kept,
        g_c=1.0,
        k_z=1 - step.after,
        k_n=step.after,
        v_o=-sign * step.sigma * scale,
        v_c=-step.sigma * kept,
    )


def stochastic_euler(sigmas: Sigmas, flow: FlowSpec, guidance: Guidance, *, first: int, eta: float) -> list[Op]:
    """Euler with re-noising: the noise that the step expects is exchanged for a new draw by the share `eta`.

    `x' = (1 - sigma') x0 + sigma' (q n' + eta n)` with the expected data and noise `x0 = x - sigma u`,
    `n' = x + (1 - sigma) u`, and `q = sqrt(1 - eta^2)`. eta 0 is Euler, 1 the stochastic sampling of diffusers.
    """
    keep = (1 - eta**2) ** 0.5
    ops = []
    for step in _steps(sigmas, flow, guidance, first):
        sigma, after = step.sigma, step.after
        coefficients = {
            "p_x": 1 - after + after * keep,
            "p_o": after * keep * (1 - sigma) - (1 - after) * sigma,
            "p_n": after * eta,
        }
        op = step.base("S", sigma, stands=after, **coefficients)
        ops.append(replace(op, draw=step.index) if coefficients["p_n"] else op)
    return ops


def _steps(sigmas: Sigmas, flow: FlowSpec, guidance: Guidance, first: int) -> Iterator[Step]:
    for index in range(first, len(sigmas) - 1):
        yield Step(index, sigmas[index], sigmas[index + 1], flow, guidance)
