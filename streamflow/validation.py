"""What a request's values may be, given the model's card: one check per field, used by the gateway and by Pipeline.

Each raises InvalidRequestError that names the field, the value and what is allowed.
"""

from __future__ import annotations

import math
import unicodedata

from streamflow.errors import InvalidRequestError
from streamflow.flow.catalog import parse_sampler
from streamflow.types import ModelCard

MAX_GUIDANCE_SCALE = 100.0


def check_prompt(field: str, prompt: str, *, max_chars: int, may_be_empty: bool = False) -> None:
    if len(prompt) > max_chars:
        raise InvalidRequestError(field, prompt, f"at most {max_chars} characters")
    # Tabs and line breaks are text that people paste; the other control characters are a mistake or an attack.
    bad = next((c for c in prompt if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"), None)
    if bad is not None:
        raise InvalidRequestError(field, prompt, "text without control characters", f"it holds U+{ord(bad):04X}")
    if not may_be_empty and not prompt.strip():
        raise InvalidRequestError(field, prompt, "at least one visible character", "say what the picture shows")


def check_size(card: ModelCard, field: str, size_px: int) -> None:
    """Args: field: "width" or "height"."""
    largest = card.max_width if field == "width" else card.max_height
    multiple = card.size_multiple
    if not multiple <= size_px <= largest or size_px % multiple:
        raise InvalidRequestError(field, size_px, f"multiples of {multiple} from {multiple} to {largest} pixels")


def check_steps(card: ModelCard, steps: int) -> None:
    if not 1 <= steps <= card.max_steps:
        raise InvalidRequestError("steps", steps, f"1 to {card.max_steps}")


def check_guidance_scale(guidance_scale: float) -> None:
    if not math.isfinite(guidance_scale) or not 0 <= guidance_scale <= MAX_GUIDANCE_SCALE:
        raise InvalidRequestError("guidance_scale", guidance_scale, f"0 to {MAX_GUIDANCE_SCALE:g}")


def check_sampler(card: ModelCard, sampler: str) -> None:
    name, _ = parse_sampler(sampler)
    if name not in card.samplers:
        raise InvalidRequestError("sampler", sampler, "one of " + ", ".join(card.samplers))


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise InvalidRequestError("seed", seed, "0 to 2**64 - 1")


def check_count(field: str, count: int, largest: int) -> None:
    if not 1 <= count <= largest:
        raise InvalidRequestError(field, count, f"1 to {largest}")
