"""FlowEdit: from an image and two texts to the changed image, without inversion (Kulikov et al., "FlowEdit").

The state x is the edited image itself. Each step noises source and edit alike with one draw n and follows the
difference of the two texts' velocities,

    c = u_source((1 - sigma) z0 + sigma n, sigma)
    x += h (u_target(x - sigma z0 + sigma n, sigma) - c)

two ops. The last steps may be plain Euler steps with the target text, which begin by noising the edit.
"""

from __future__ import annotations

from dataclasses import replace

from streamflow.flow.blocks import Step, euler
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Op, Role
from streamflow.flow.schedules import Sigmas
from streamflow.flow.spec import FlowSpec


def flow_edit(
    sigmas: Sigmas,
    flow: FlowSpec,
    guidance: Guidance,
    *,
    source_guidance_scale: float,
    start: int,
    first: int,
    last_plain: int,
) -> list[Op]:
    """The ops of the steps from `first` on.

    Args:
        guidance: of the target text.
        source_guidance_scale: of the source text.
        start: the step at which the edit begins; `first` is later where it goes on.
        last_plain: how many of the last steps sample as usual.
    """
    ops: list[Op] = []
    source = replace(guidance, scale=source_guidance_scale)
    change_at = max(start, len(sigmas) - 1 - last_plain)
    for index in range(first, len(sigmas) - 1):
        step = Step(index, sigmas[index], sigmas[index + 1], flow, guidance)
        if index < change_at:
            ops += _edit(step, source)
        elif index == change_at:
            ops.append(_noise_edit(step))
        else:
            ops += euler(step)
    return ops


def _edit(step: Step, source: Guidance) -> list[Op]:
    sigma = step.sigma
    # Outside a mask the edit stays the source, which is no noised image.
    kept = {"k_z": 1.0, "k_n": 0.0}
    noised = {"i_x": 0.0, "i_z": 1 - sigma, "i_n": sigma}
    # What T subtracts belongs to this step's draw everywhere, so a mask leaves it alone.
    of_source = replace(step, guidance=source).base("S", sigma, stands=sigma, k_c=0.0, **noised, **kept)
    of_target = step.base("T", sigma, stands=step.after, p_o=step.h, p_c=-step.h, i_z=-sigma, i_n=sigma, **kept)
    return [replace(of_source, role=Role.SOURCE, draw=step.index), replace(of_target, draw=step.index)]


def _noise_edit(step: Step) -> Op:
    sigma = step.sigma
    noised = {"i_z": -sigma, "i_n": sigma, "p_z": -sigma, "p_n": sigma}
    return replace(step.base("E", sigma, stands=step.after, p_o=step.h, **noised), draw=step.index)
