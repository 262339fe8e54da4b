"""From a time budget to steps, sampler and decoder: the best of what fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamflow.config import GatewaySettings
from streamflow.errors import InvalidRequestError
from streamflow.flow.samplers import sampler_steps
from streamflow.rpc import convert
from streamflow.types import DecoderKind, ModelCard
from streamflow.v1 import types_pb2

LEAST_BUDGET_S = 0.05

_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25)
"""What is worth choosing between; more hardly changes a picture."""


@dataclass(frozen=True, slots=True)
class Choice:
    sampler: str
    steps: int

    def apply(self, request: types_pb2.GenerateRequest, decoder: DecoderKind | None) -> types_pb2.GenerateRequest:
        """The request as if its sender had chosen."""
        chosen = types_pb2.GenerateRequest()
        chosen.CopyFrom(request)
        chosen.ClearField("time_budget_s")
        chosen.ClearField("min_steps")
        chosen.sampler, chosen.steps = self.sampler, self.steps
        if decoder is not None and not request.output.decoder:
            chosen.output.decoder = convert.decoder_to_pb(decoder)
        return chosen


def check_budget(request: types_pb2.GenerateRequest, card: ModelCard, settings: GatewaySettings) -> None:
    """Raises InvalidRequestError."""
    if not request.HasField("time_budget_s"):
        if request.HasField("min_steps"):
            raise InvalidRequestError("min_steps", request.min_steps, "only with time_budget_s")
        return
    budget_s = request.time_budget_s
    if not LEAST_BUDGET_S <= budget_s <= settings.max_timeout_s or not math.isfinite(budget_s):
        raise InvalidRequestError(
            "time_budget_s", budget_s, f"{LEAST_BUDGET_S:g} to {settings.max_timeout_s:g} seconds"
        )
    if request.HasField("steps"):
        raise InvalidRequestError("steps", request.steps, "leave it out with time_budget_s", "min_steps is the least")
    if request.HasField("min_steps") and not 1 <= request.min_steps <= card.max_steps:
        raise InvalidRequestError("min_steps", request.min_steps, f"1 to {card.max_steps}")


def choices(request: types_pb2.GenerateRequest, card: ModelCard) -> list[Choice]:
    """What may be chosen, from the least work to the most.

    A sampler that the request names stays. Otherwise Euler for one and two steps, and beyond them what was measured to
    be best at equal time (docs/samplers.md): blocks with a refiner where the checkpoint has one, else the pseudo
    corrector. Euler throughout for the residual guidance modes, which no other sampler has.

    Raises:
        InvalidRequestError: no such sampler or guidance mode, or a notation of fewer steps than min_steps.
    """
    least = max(1, request.min_steps, card.flow.windows.windows if card.flow.windows else 1)
    wanted = [least, *(steps for steps in _STEPS if least < steps <= card.max_steps)]
    given = request.sampler.strip()
    if given:
        # A notation says its own steps.
        fixed = sampler_steps(given, 0)
        if 0 < fixed < request.min_steps:
            hint = "write more blocks, or leave it out"
            raise InvalidRequestError("min_steps", request.min_steps, f"at most {fixed} with the sampler {given}", hint)
        return [Choice(given, fixed)] if fixed else [Choice(given, steps) for steps in wanted]
    if card.flow.windows is not None:
        return [Choice(card.default_sampler, steps) for steps in wanted]
    scale = request.guidance_scale if request.HasField("guidance_scale") else card.default_guidance_scale
    residual = convert.guidance_from_pb(scale, request.guidance, card=card).is_residual
    refined = card.flow.refiner is not None
    return [Choice("euler" if residual else _best(steps, refined=refined), steps) for steps in wanted]


def _best(steps: int, *, refined: bool) -> str:
    if steps <= 2:
        return "euler"
    return f"H1P{steps - 3}R2" if refined and steps >= 4 else "pseudo"


def choose(
    found: Sequence[Choice], expected_s: Sequence[float | None], *, budget_s: float, card: ModelCard
) -> tuple[Choice, DecoderKind | None]:
    """The most that is expected to fit, and a decoder where that is worth choosing.

    The least of all where nothing fits: whether it can be served at all is for admission to say. The least also while
    there is no measurement to go by: what misses its deadline is never measured, so that a bolder choice could be
    missed again and again.

    Args:
        expected_s: per choice, how long the request would take, with room for the estimate to be wrong; None = unknown.
    """
    fitting = [k for k, seconds in enumerate(expected_s) if seconds is not None and seconds <= budget_s]
    best = fitting[-1] if fitting else 0
    # The better decoder where even the most steps leave half of the time.
    generous = bool(fitting) and best == len(found) - 1 and (expected_s[best] or 0.0) <= budget_s / 2
    return found[best], DecoderKind.FULL if generous and DecoderKind.FULL in card.decoders else None
