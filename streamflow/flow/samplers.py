"""The samplers by name, and from a request's sampler string to a program.

A sampler string is a name with options in brackets, such as `euler` or `perflow[windows=4,exact=true]`, or FlowTurbo's
block notation, such as `H2P4R2`. To add a sampler, write a function that makes its ops and enter it in `SAMPLERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from streamflow.errors import InvalidRequestError
from streamflow.flow.blocks import BLOCKS, Blocks, arrange, compile_blocks, residual_euler, spread, stochastic_euler
from streamflow.flow.edit import flow_edit
from streamflow.flow.guidance import Guidance
from streamflow.flow.options import Option, choice, integer, number, read_options
from streamflow.flow.perflow import Windows, perflow
from streamflow.flow.programs import REFINER, Op, Program
from streamflow.flow.schedules import Sigmas, first_step
from streamflow.flow.spec import FlowSpec

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9-]+)(\[(?P<options>[^\[\]]*)\])?")
_NOTATION = re.compile(r"([A-Z]\d{1,4})+")
_LETTERS = "EHMPR"
MAX_NOTATION_STEPS = 1000
MAX_SAMPLER_CHARS = 200


@dataclass(frozen=True, slots=True)
class SamplerRequest:
    """What a request says of its sampling.

    Attributes:
        steps: of the schedule; None = what the sampler's notation says, or its default.
        strength: of the change of a source image; None where there is none.
        tokens: packed tokens of the image, for checkpoints whose schedule depends on it.
        resume_at: index of the step at which an image that is under way goes on; 0 = from the start.
    """

    steps: int | None = None
    guidance: Guidance = field(default_factory=Guidance)
    strength: float | None = None
    tokens: int = 0
    resume_at: int = 0


@dataclass(frozen=True, slots=True)
class SamplerInfo:
    """A sampler as users see it, and the function that compiles it.

    Attributes:
        evaluations: of the network per step, such as "1" or "2".
    """

    summary: str
    evaluations: str
    compile: Callable[[_Task], Program]
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler string, read: the name, the values of its options, and the blocks of a notation."""

    text: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: Blocks = ()


def parse_sampler(text: str) -> Sampler:
    """Reads a sampler string. Raises InvalidRequestError for names, blocks or options that do not exist."""
    # Texts are kept, as keys of the cache and in jobs.
    if len(text) > MAX_SAMPLER_CHARS or not text.strip().isprintable():
        raise InvalidRequestError("sampler", text, f"at most {MAX_SAMPLER_CHARS} printable characters")
    text = text.strip()
    match = _NAMED.fullmatch(text)
    if match is None:
        raise _unknown(text)
    name = match["name"]
    if name in SAMPLERS and name != NOTATION:
        return Sampler(text, name, read_options(text, match["options"], SAMPLERS[name].options))
    if not _NOTATION.fullmatch(name):
        raise _unknown(text)
    return Sampler(
        text, NOTATION, read_options(text, match["options"], SAMPLERS[NOTATION].options), _read_blocks(text, name)
    )


@lru_cache(maxsize=256)
def compile_sampler(text: str, request: SamplerRequest, flow: FlowSpec) -> Program:
    """Compiles the sampler that `text` names for a checkpoint's flow; equal requests share one program.

    Raises:
        InvalidRequestError: unknown sampler or option, or values with which it cannot run on this checkpoint.
    """
    sampler = parse_sampler(text)
    if flow.windows is not None and sampler.name not in served(flow):
        raise InvalidRequestError("sampler", text, "perflow, because this checkpoint's flow is piecewise")
    program = SAMPLERS[sampler.name].compile(_Task(sampler, request, flow))
    return replace(program, warnings=(*program.warnings, *_refiner_warnings(sampler, program, flow)))


def served(flow: FlowSpec) -> tuple[str, ...]:
    """The names of the samplers that serve a flow; a notation is written, not named."""
    return tuple(name for name in SAMPLERS if name != NOTATION) if flow.windows is None else ("perflow",)


def sampler_steps(text: str, default: int) -> int:
    """The steps that a request with this sampler has when it leaves them out."""
    return len(parse_sampler(text).blocks) or default


@dataclass(frozen=True, slots=True)
class _Task:
    """A sampler to compile: what was asked, for which flow."""

    sampler: Sampler
    request: SamplerRequest
    flow: FlowSpec

    @property
    def steps(self) -> int:
        """Raises InvalidRequestError: the request's steps are not those of the notation."""
        blocks, steps = self.sampler.blocks, self.request.steps
        if blocks and steps is not None and steps != len(blocks):
            hint = "leave steps out, or write other blocks"
            raise InvalidRequestError("steps", steps, f"{len(blocks)} with the sampler {self.sampler.text}", hint)
        if not blocks and steps is None:
            raise InvalidRequestError("steps", steps, "a number of steps")
        return len(blocks) or steps or 0

    @property
    def start(self) -> int:
        """The step at which the image starts."""
        if self.request.strength is None:
            return 0
        return first_step(self.steps, self.request.strength, round_up=self.flow.round_up_strength)

    @property
    def first(self) -> int:
        """The first step of the program: the start, or where an image that is under way goes on."""
        return max(self.start, self.request.resume_at)

    @property
    def guidance(self) -> Guidance:
        return self.request.guidance

    def sigmas(self, shift: float | None = None) -> Sigmas:
        given = self.sampler.options.get("shift", shift)
        return self.flow.schedule.sigmas(self.steps, tokens=self.request.tokens, shift=given)

    def option(self, name: str, default: Any) -> Any:
        return self.sampler.options.get(name, default)

    def program(self, ops: list[Op], start: tuple[float, float]) -> Program:
        """Args: start: factors of source and noise where an image with a source starts."""
        start_z, start_n = start if self.start else (0.0, 1.0)
        return Program(tuple(ops), start_z=start_z, start_n=start_n)

    def refuse_residual_guidance(self) -> None:
        if self.guidance.is_residual:
            given = f"{self.guidance.mode} with the sampler {self.sampler.text}"
            raise InvalidRequestError("guidance_mode", given, "full; the residual modes need the sampler euler")


def _compile_blocks(task: _Task, block: str = "", shift: float | None = None) -> Program:
    sigmas, first = task.sigmas(shift), task.first
    start = (1 - sigmas[first], sigmas[first])
    if task.guidance.is_residual and block == "E":
        return task.program(residual_euler(sigmas, task.flow, task.guidance, first=first), start)
    task.refuse_residual_guidance()
    blocks = spread(task.sampler.blocks or [block] * task.steps, task.steps - task.start)[first - task.start :]
    arranged = arrange(blocks, evaluates_data=task.flow.evaluates_data)
    return task.program(compile_blocks(arranged, sigmas, task.flow, task.guidance, first=first), start)


def _compile_notation(task: _Task) -> Program:
    if "R" in task.sampler.blocks and task.flow.refiner is None:
        allowed = "a checkpoint with a refiner (a folder unet_refiner) for the block R"
        raise InvalidRequestError("sampler", task.sampler.text, allowed, "use E, H, M and P, or such a checkpoint")
    return _compile_blocks(task)


def _compile_stochastic(task: _Task) -> Program:
    task.refuse_residual_guidance()
    sigmas, first = task.sigmas(), task.first
    ops = stochastic_euler(sigmas, task.flow, task.guidance, first=first, eta=task.option("eta", 1.0))
    return task.program(ops, (1 - sigmas[first], sigmas[first]))


def _compile_flow_edit(task: _Task) -> Program:
    task.refuse_residual_guidance()
    if task.request.strength is None:
        raise InvalidRequestError("sampler", task.sampler.text, "only with an image and its source_prompt")
    scale, last = task.option("source_guidance", 1.0), task.option("last_plain", 0)
    ops = flow_edit(
        task.sigmas(),
        task.flow,
        task.guidance,
        source_guidance_scale=scale,
        start=task.start,
        first=task.first,
        last_plain=last,
    )
    return Program(tuple(ops), start_z=1.0, start_n=0.0)


def _compile_perflow(task: _Task) -> Program:
    task.refuse_residual_guidance()
    windows, exact = _windows(task), task.option("exact", False)
    if task.steps < windows.count:
        allowed = f"at least {windows.count} with {windows.count} windows"
        raise InvalidRequestError("steps", task.steps, allowed, "raise steps, or lower the option windows")
    most = windows.max_steps(exact=exact)
    if task.steps > most:
        hint = "lower steps" if exact else "lower steps, or choose the option exact=true"
        raise InvalidRequestError("steps", task.steps, f"at most {most} with {windows.count} windows", hint)
    times = windows.times(task.steps, exact=exact)
    ops = perflow(windows, times, task.flow, task.guidance, first=task.first)
    return task.program(ops, windows.noising(times[task.first]))


def _windows(task: _Task) -> Windows:
    """Raises InvalidRequestError for a prediction that is not the network's."""
    spec = task.flow.windows
    prediction = task.option("prediction", spec.prediction if spec else "velocity")
    if spec is None and prediction != "velocity":
        allowed = "prediction=velocity, which is what this checkpoint's network predicts"
        raise InvalidRequestError("sampler", task.sampler.text, allowed, "use a PeRFlow checkpoint for the others")
    count = task.option("windows", spec.windows if spec else 4)
    return Windows(None if spec is None else replace(spec, prediction=prediction, windows=count), count)


def _refiner_warnings(sampler: Sampler, program: Program, flow: FlowSpec) -> list[str]:
    steps = [abs(op.i_c) for op in program.ops if op.network == REFINER]
    if flow.refiner is None or not steps or max(steps) <= flow.refiner.max_step + 1e-9:
        return []
    return [
        f"sampler {sampler.text}: the refiner is asked for a step of {max(steps):.3g} in sigma and was trained for at "
        f"most {flow.refiner.max_step:g}; more steps, or blocks E, H and P in place of R, are safer"
    ]


def _read_blocks(text: str, name: str) -> tuple[str, ...]:
    runs = [(run[0], int(run[1:])) for run in re.findall(r"[A-Z]\d+", name)]
    unknown = sorted({letter for letter, _ in runs if letter not in _LETTERS})
    if unknown:
        about = ", ".join(f"{letter} ({_BLOCK_NAMES[letter]})" for letter in _LETTERS)
        raise InvalidRequestError("sampler", text, f"the blocks {about}", f"there is no {', '.join(unknown)}")
    total = sum(count for _, count in runs)
    if not 1 <= total <= MAX_NOTATION_STEPS or any(count < 1 for _, count in runs):
        raise InvalidRequestError("sampler", text, f"1 to {MAX_NOTATION_STEPS} steps in all, each count 1 or more")
    if runs[0][0] == "R":
        hint = "the refiner changes a velocity that another block has evaluated: begin with H1 or E1"
        raise InvalidRequestError("sampler", text, "a first block E, H, M or P", hint)
    return tuple(letter for letter, count in runs for _ in range(count))


def _unknown(text: str) -> InvalidRequestError:
    names = ", ".join(name for name in SAMPLERS if name != NOTATION)
    known = re.split(r"\W", text, maxsplit=1)[0]
    hint = f"options are written as in {known}[option=value]" if known in SAMPLERS and known != text else ""
    return InvalidRequestError("sampler", text, f"one of {names}, or blocks such as H2P4R2", hint)


_SHIFT = {"shift": number("in place of the schedule's own", 0.01, 100)}
_BLOCK_NAMES = {"E": "Euler", "H": "Heun", "M": "midpoint", "P": "pseudo corrector", "R": "refiner"}
assert _BLOCK_NAMES.keys() <= BLOCKS.keys()

NOTATION = "blocks"
"""Name of the entry in SAMPLERS that stands for every block notation."""

SAMPLERS: dict[str, SamplerInfo] = {
    "euler": SamplerInfo("along a straight line; first order", "1", partial(_compile_blocks, block="E"), _SHIFT),
    "heun": SamplerInfo(
        "the mean of the velocities at both ends; second order", "2", partial(_compile_blocks, block="H"), _SHIFT
    ),
    "midpoint": SamplerInfo(
        "the velocity half-way (RF-Solver); second order", "2", partial(_compile_blocks, block="M"), _SHIFT
    ),
    "fireflow": SamplerInfo(
        "midpoint that goes on from the last velocity; second order", "1", partial(_compile_blocks, block="L"), _SHIFT
    ),
    "pseudo": SamplerInfo(
        "Heun that goes on from the last velocity (FlowTurbo's pseudo corrector); second order",
        "1",
        partial(_compile_blocks, block="P"),
        _SHIFT,
    ),
    "instaflow": SamplerInfo(
        "Euler on evenly spaced sigmas, for one-step and 2-rectified flows",
        "1",
        partial(_compile_blocks, block="E", shift=1.0),
    ),
    "euler-sde": SamplerInfo(
        "Euler that exchanges a share of the noise in every step",
        "1",
        _compile_stochastic,
        {"eta": number("share of new noise; 0 = euler, the default is 1", 0, 1), **_SHIFT},
    ),
    "perflow": SamplerInfo(
        "piecewise straight, in windows of time (PeRFlow)",
        "1",
        _compile_perflow,
        {
            "prediction": choice(
                "what the network gives; the default is the checkpoint's",
                {name: name for name in ("diff_eps", "ddim_eps", "velocity")},
            ),
            "windows": integer("of time; the default is the checkpoint's, or 4", 1, 100),
            "exact": choice(
                "times as they are, rather than cut to thousandths like the published scheduler's (default)",
                {"true": True, "false": False},
            ),
        },
    ),
    "flowedit": SamplerInfo(
        "from an image and two texts to the changed image (FlowEdit); strength says where it starts",
        "2",
        _compile_flow_edit,
        {
            "source_guidance": number("guidance of the source text; the default is 1", 0, 100),
            "last_plain": integer("steps at the end that sample as usual; the default is 0", 0, 1000),
            **_SHIFT,
        },
    ),
    NOTATION: SamplerInfo(
        "FlowTurbo's notation, such as H2P4R2: blocks of one step each, E Euler, H Heun, M midpoint, P pseudo "
        "corrector, R refiner; the counts add up to the steps",
        "E 1, H 2, M 2, P 1, R 2 of the refiner",
        _compile_notation,
        _SHIFT,
    ),
}
"""By name, in the order in which they are listed."""
