"""What a checkpoint offers, put together from what its family knows and what the checkpoint recommends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamflow.errors import InvalidRequestError
from streamflow.families.advice import ADVICE
from streamflow.families.autoencoders import decoder_kinds, latent_factor
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.flows import RECTIFIED, Usage
from streamflow.flow.guidance import Guidance
from streamflow.flow.samplers import sampler_steps, served
from streamflow.flow.spec import FlowSpec
from streamflow.types import DecoderKind, ModelCard
from streamflow.validation import check_sampling

MAX_STEPS = 100
LARGER_THAN_USUAL = 4
"""Sides may be so many times the default ones, where nothing else limits them."""


def make_card(
    checkpoint: Checkpoint,
    *,
    family: str,
    parts: Iterable[str],
    flow: FlowSpec,
    usage: Usage,
    size_px: tuple[int, int],
    latent_channels: int,
    max_prompt_tokens: int,
    max_px: int | None = None,
    flow_name: str = RECTIFIED,
    patch: int = 1,
    **more: Any,
) -> ModelCard:
    """The card of a checkpoint; what its `streamflow.json` recommends goes before what its family does.

    Args:
        parts: folders that are served; they make the revision.
        usage: as the family recommends it.
        size_px: default height and width.
        max_px: longest side; None = some times the default.
        flow_name: as which the weights are served, see flows.py.
        patch: latents are taken in squares of so many on a side.
        more: further fields of the card.
    """
    advice, (height, width) = checkpoint.recommended, size_px
    factor, decoders = latent_factor(checkpoint), decoder_kinds(checkpoint)
    weights = checkpoint.weights_revision(parts, flow="" if flow_name == RECTIFIED else flow_name)
    fields = {
        "max_width": advice.get("max_width", max_px or LARGER_THAN_USUAL * width),
        "max_height": advice.get("max_height", max_px or LARGER_THAN_USUAL * height),
        "size_multiple": patch * factor,
        "adapters": tuple(sorted(checkpoint.adapters)),
        "controls": tuple(sorted(checkpoint.controls)),
        **more,
    }
    card = ModelCard(
        name=checkpoint.name,
        family=family,
        revision=checkpoint.revision(weights),
        weights_revision=weights,
        default_width=width,
        default_height=height,
        default_steps=advice.get("default_steps", usage.steps),
        max_steps=advice.get("max_steps", MAX_STEPS),
        default_guidance_scale=advice.get("default_guidance_scale", usage.guidance_scale),
        default_sampler=advice.get("default_sampler", usage.sampler),
        samplers=served(flow),
        decoders=decoders,
        default_decoder=DecoderKind(advice.get("default_decoder", decoders[0])),
        max_prompt_tokens=max_prompt_tokens,
        latent_channels=latent_channels,
        latent_factor=factor,
        flow=flow,
        **fields,
    )
    if advice:
        _check_defaults(card, checkpoint.folder / ADVICE)
    return card


def _check_defaults(card: ModelCard, file: Path) -> None:
    """Whether a request that says nothing can run with what a file recommends. Raises InvalidRequestError."""
    for name, most, default in (
        ("max_steps", card.max_steps, card.default_steps),
        ("max_width", card.max_width, card.default_width),
        ("max_height", card.max_height, card.default_height),
    ):
        if most < default:
            raise InvalidRequestError(f"{file}: {name}", most, f"{default} or more, which is the default")
    size_px, guidance = (card.default_width, card.default_height), Guidance(card.default_guidance_scale)
    try:
        check_sampling(
            card,
            sampler=card.default_sampler,
            # Of some samplers the text says how many.
            steps=sampler_steps(card.default_sampler, card.default_steps),
            guidance=guidance,
            strength=None,
            size_px=size_px,
        )
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{file}: default_{error.field}", error.given, error.allowed, error.hint) from error
