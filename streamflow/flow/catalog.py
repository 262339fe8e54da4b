"""The samplers by name, and what can be said of a request for one without torch.

The gateway reads this to refuse a request before it is admitted; `samplers` compiles the programs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from streamflow.errors import InvalidRequestError

_PATTERN = re.compile(r"(?P<name>[A-Za-z0-9-]+)(\[(?P<options>[^\[\]]*)\])?")


@dataclass(frozen=True, slots=True)
class SamplerInfo:
    """What users read of a sampler: one line, and its options with their meaning."""

    summary: str
    options: Mapping[str, str] = field(default_factory=dict)


SAMPLERS: dict[str, SamplerInfo] = {
    "euler": SamplerInfo("one network evaluation a step along a straight line; the default"),
}


def parse_sampler(text: str) -> tuple[str, dict[str, str]]:
    """Splits `name[option=value,...]`. Raises InvalidRequestError for names or options that do not exist."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None or match["name"] not in SAMPLERS:
        raise InvalidRequestError("sampler", text, "one of " + ", ".join(SAMPLERS))
    known = SAMPLERS[match["name"]].options
    options: dict[str, str] = {}
    for item in filter(None, (match["options"] or "").split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in known or key in options:
            allowed = ", ".join(known) if known else f"none: {match['name']} has no options"
            raise InvalidRequestError(
                "sampler", text, f"options {allowed}", "write them once each, as name[option=value]"
            )
        options[key] = value
    return match["name"], options


def first_step(num_steps: int, strength: float, *, round_up: bool) -> int:
    """The step at which img2img starts, as the reference pipelines of the family count it.

    Args:
        strength: in (0, 1]; 1 runs every step.
        round_up: rectified-flow pipelines (SD3, FLUX) run `ceil(N * strength)` steps, the SD family `floor`.

    Raises:
        InvalidRequestError: no step would be left.
    """
    # Requests carry float32, in which 0.7 of 10 steps would be 6: all forms count from the same rounded number.
    strength = round(strength, 6)
    if not 0 < strength <= 1:
        raise InvalidRequestError("strength", strength, "greater than 0, at most 1")
    steps = min(num_steps * strength, num_steps)
    start = int(num_steps - steps) if round_up else num_steps - int(steps)
    if start >= num_steps:
        raise InvalidRequestError(
            "strength",
            strength,
            f"at least {1 / num_steps:.3g} with {num_steps} steps",
            "raise strength or steps: none would run",
        )
    return start
