"""What a request's values may be, given the model's card: one check per field, used by the gateway and by Pipeline.

Each raises InvalidRequestError that names the field, the value and what is allowed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from streamflow.errors import InvalidRequestError
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Program, Role
from streamflow.flow.samplers import SamplerRequest, compile_sampler
from streamflow.types import ModelCard, Variant

MAX_GUIDANCE_SCALE = 100.0
MAX_ADAPTER_WEIGHT = 10.0
MAX_CONTROL_SCALE = 10.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_request_id(request_id: str, *, field: str = "request_id") -> None:
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError(field, request_id, "1 to 64 of A-Z a-z 0-9 . _ -")


def check_prompt(field: str, prompt: str, *, max_chars: int, may_be_empty: bool = False) -> None:
    if len(prompt) > max_chars:
        raise InvalidRequestError(field, prompt, f"at most {max_chars} characters")
    # Tabs and line breaks are text that people paste; the other control characters are a mistake or an attack.
    bad = next((c for c in prompt if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"), None)
    if bad is not None:
        raise InvalidRequestError(field, prompt, "text without control characters", f"it holds U+{ord(bad):04X}")
    if not may_be_empty and not any(unicodedata.category(c)[0] in "LNPS" for c in prompt):
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


def check_guidance(guidance: Guidance) -> None:
    check_guidance_scale(guidance.scale)
    check_guidance_scale(guidance.embedded)
    # A comparison with NaN is false, so it fails here.
    if not 0 <= guidance.end_sigma <= guidance.start_sigma <= 1:
        given = f"{guidance.start_sigma:g} down to {guidance.end_sigma:g}"
        raise InvalidRequestError("guidance_interval", given, "two sigmas from 1 (noise) to 0 (data), the larger first")
    if not 0 <= guidance.residual <= 1:
        raise InvalidRequestError("residual_strength", guidance.residual, "0 to 1")


def check_sampling(
    card: ModelCard, *, sampler: str, steps: int, guidance: Guidance, strength: float | None, size_px: tuple[int, int]
) -> Program:
    """The program that a request's values give.

    Args:
        strength: None where there is no init image.
        size_px: width and height.
    """
    check_steps(card, steps)
    check_guidance(guidance)
    width, height = (size // card.latent_factor for size in size_px)
    # Tokens are patches of 2 x 2 latents.
    request = SamplerRequest(steps, guidance, strength, tokens=width * height // 4)
    return compile_sampler(sampler, request, card.flow)


def texts_for(
    program: Program, *, prompt: str, negative_prompt: str = "", source_prompt: str = "", sampler: str
) -> dict[Role, str]:
    """The texts that a program needs, by what they are for.

    Raises:
        InvalidRequestError: it needs a source prompt that is not there, or has no use for one.
    """
    if Role.SOURCE in program.roles and not source_prompt.strip():
        hint = "say what the image shows"
        raise InvalidRequestError("source_prompt", source_prompt, f"a text, with the sampler {sampler}", hint)
    if Role.SOURCE not in program.roles and source_prompt:
        hint = "leave it out, or choose the sampler flowedit"
        raise InvalidRequestError("source_prompt", source_prompt, f"none with the sampler {sampler}", hint)
    texts = {Role.TARGET: prompt, Role.NEGATIVE: negative_prompt, Role.SOURCE: source_prompt}
    return {role: text for role, text in texts.items() if role in program.roles}


def check_class_label(card: ModelCard, label: int) -> None:
    if not 0 <= label < card.class_labels:
        raise InvalidRequestError("class_labels", label, f"0 to {card.class_labels - 1}")


def check_subjects(
    card: ModelCard,
    prompts: Sequence[str],
    class_labels: Sequence[int],
    *,
    most: int,
    negative_prompt: str = "",
    source_prompt: str = "",
) -> None:
    """Whether a request names what the model takes: prompts, or labels.

    Args:
        most: of either.
    """
    if card.class_labels:
        hint = f"{card.name} takes class_labels, 0 to {card.class_labels - 1}"
        for field, text in (("negative_prompt", negative_prompt), ("source_prompt", source_prompt)):
            if text:
                raise InvalidRequestError(field, text, "none", hint)
        if prompts or not class_labels:
            raise InvalidRequestError("prompts", f"{len(prompts)}", "none", hint)
    if class_labels and not card.class_labels:
        raise InvalidRequestError("class_labels", f"{len(class_labels)} labels", "none", f"{card.name} takes prompts")
    for label in class_labels:
        check_class_label(card, label)
    field, subjects = ("class_labels", class_labels) if card.class_labels else ("prompts", prompts)
    if not 1 <= len(subjects) <= most:
        raise InvalidRequestError(field, f"{len(subjects)} {field.replace('_', ' ')}", f"1 to {most}")


def check_true_cfg_scale(card: ModelCard, true_cfg_scale: float | None, negative_prompt: str) -> None:
    """Guidance with a negative prompt, of models that are fed guidance_scale."""
    if card.embedded_guidance and negative_prompt and not (true_cfg_scale or 0) > 1:
        allowed = f"none, or one with true_cfg_scale above 1: {card.name} is fed guidance_scale, which knows no prompt"
        raise InvalidRequestError("negative_prompt", negative_prompt, allowed)
    if true_cfg_scale is None:
        return
    if not card.embedded_guidance:
        hint = f"{card.name} has guidance_scale only"
        raise InvalidRequestError("true_cfg_scale", true_cfg_scale, "leave it out", hint)
    if not math.isfinite(true_cfg_scale) or not 0 <= true_cfg_scale <= MAX_GUIDANCE_SCALE:
        raise InvalidRequestError("true_cfg_scale", true_cfg_scale, f"0 to {MAX_GUIDANCE_SCALE:g}")
    if true_cfg_scale > 1 and not negative_prompt:
        hint = "say what to steer away from"
        raise InvalidRequestError("true_cfg_scale", true_cfg_scale, "more than 1 only with a negative_prompt", hint)


def check_variant(card: ModelCard, variant: Variant) -> None:
    """Adapters and a ControlNet of a request."""
    names = [use.name for use in variant.adapters]
    for use in variant.adapters:
        if use.name not in card.adapters:
            raise InvalidRequestError("adapters", use.name, _names(card, "adapters", card.adapters))
        if names.count(use.name) > 1:
            raise InvalidRequestError("adapters", use.name, "each name once")
        # A comparison with NaN is false, so it fails here.
        if not abs(use.weight) <= MAX_ADAPTER_WEIGHT:
            allowed = f"-{MAX_ADAPTER_WEIGHT:g} to {MAX_ADAPTER_WEIGHT:g}"
            raise InvalidRequestError("adapters", f"{use.name} with weight {use.weight:g}", allowed)
    if variant.control and variant.control not in card.controls:
        raise InvalidRequestError("control", variant.control, _names(card, "controls", card.controls))


def check_control_image(control: str, has_image: bool, scale: float) -> None:
    """Args: control: the name of a ControlNet; empty = none."""
    if has_image and not control:
        raise InvalidRequestError("control.image", "an image", "only with the name of a ControlNet")
    if control and not has_image:
        raise InvalidRequestError("control.image", "none", f"what {control} reads, such as edges or a depth map")
    # A comparison with NaN is false, so it fails here.
    if not 0 <= scale <= MAX_CONTROL_SCALE:
        raise InvalidRequestError("control.scale", scale, f"0 to {MAX_CONTROL_SCALE:g}")


def _names(card: ModelCard, what: str, names: Sequence[str]) -> str:
    return "one of " + ", ".join(names) if names else f"none: {card.name} has no {what}"


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise InvalidRequestError("seed", seed, "0 to 2**64 - 1")


def check_count(field: str, count: int, largest: int) -> None:
    if not 1 <= count <= largest:
        raise InvalidRequestError(field, count, f"1 to {largest}")
