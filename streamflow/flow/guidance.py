"""Guidance as data: which op is guided by how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from streamflow.errors import InvalidRequestError

# Requests carry float32, in which the sigma 0.7 lies outside an interval that begins at 0.7.
_TOLERANCE = 1e-6


class GuidanceMode(StrEnum):
    """What an evaluation is steered away from.

    FULL: the negative prompt, with a second row in every evaluation (Ho and Salimans, "Classifier-free diffusion
    guidance"). The other two, from StreamDiffusion (Kodaira et al.), spare that row; for rectified flows they are
    derived rather than published, and experimental: SELF_NEGATIVE from the velocity towards the source image (without
    one, towards an empty one); ONETIME_NEGATIVE from the negative prompt's velocity at the first step.
    """

    FULL = "full"
    SELF_NEGATIVE = "self-negative"
    ONETIME_NEGATIVE = "onetime-negative"


@dataclass(frozen=True, slots=True)
class Guidance:
    """How an image is guided: `o = o_n + scale (o_c - o_n)` with the conditional and the negative output.

    Attributes:
        scale: 1 or less = the conditional output alone.
        start_sigma, end_sigma: it acts on evaluations from start_sigma down to end_sigma, both included (Kynkäänniemi
            et al., "Applying guidance in a limited interval").
        mode: where the negative output comes from.
        residual: strength of that output in the residual modes.
        embedded: a scale that the network is fed, by models into which guidance was distilled (FLUX).
    """

    scale: float = 1.0
    start_sigma: float = 1.0
    end_sigma: float = 0.0
    mode: GuidanceMode = GuidanceMode.FULL
    residual: float = 1.0
    embedded: float = 0.0

    @property
    def on(self) -> bool:
        return self.scale > 1

    @property
    def is_residual(self) -> bool:
        return self.on and self.mode is not GuidanceMode.FULL

    def at(self, sigma: float) -> float:
        """The scale for an evaluation at `sigma`: 1 outside the interval, so that its second row drops out."""
        inside = self.end_sigma - _TOLERANCE <= sigma <= self.start_sigma + _TOLERANCE
        return self.scale if self.on and inside else 1.0


def read_interval(value: Iterable[float]) -> tuple[float, float]:
    """The two sigmas of a `guidance_interval`. Raises InvalidRequestError."""
    try:
        start, end = map(float, value)
    except (TypeError, ValueError):
        allowed = "two sigmas, where guidance begins and where it ends, such as (0.9, 0.2)"
        raise InvalidRequestError("guidance_interval", value, allowed) from None
    return start, end
