"""From a request's sampler string to a program.

A sampler string is a name with options in brackets, such as `euler`. To add a sampler, enter it in `catalog.SAMPLERS`
and write the function here that makes its table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from streamflow.flow.catalog import first_step, parse_sampler
from streamflow.flow.programs import Prediction, Program, euler
from streamflow.flow.schedules import rectified_flow_schedule


@dataclass(frozen=True, slots=True)
class FlowSpec:
    """What a checkpoint says of its flow.

    Attributes:
        prediction: what the network means.
        shift: static shift of the schedule.
        round_up_strength: see `first_step`.
    """

    prediction: Prediction = field(default_factory=Prediction)
    shift: float = 1.0
    round_up_strength: bool = False


@dataclass(frozen=True, slots=True)
class SamplerRequest:
    """What a request says of its sampler; `strength` is None where there is no source image."""

    steps: int
    guidance_scale: float
    strength: float | None = None


Compiler = Callable[[SamplerRequest, FlowSpec, Mapping[str, str]], Program]


def compile_sampler(text: str, request: SamplerRequest, flow: FlowSpec) -> Program:
    """Compiles the sampler that `text` names.

    Raises:
        InvalidRequestError: unknown sampler or option, or values with which it cannot run.
    """
    name, options = parse_sampler(text)
    return COMPILERS[name](request, flow, options)


def _compile_euler(request: SamplerRequest, flow: FlowSpec, options: Mapping[str, str]) -> Program:
    schedule = rectified_flow_schedule(request.steps, shift=flow.shift)
    start = 0
    if request.strength is not None:
        start = first_step(request.steps, request.strength, round_up=flow.round_up_strength)
    return euler(schedule, flow.prediction, guidance_scale=request.guidance_scale, start=start)


COMPILERS: dict[str, Compiler] = {"euler": _compile_euler}
"""By the names of `catalog.SAMPLERS`."""
