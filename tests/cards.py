"""The model card of tests that load no model."""

from __future__ import annotations

from streamflow.types import DecoderKind, ModelCard

CARD = ModelCard(
    name="shapes",
    family="sd",
    revision="r1",
    default_width=64,
    default_height=64,
    size_multiple=8,
    max_width=1024,
    max_height=1024,
    default_steps=4,
    max_steps=50,
    default_guidance_scale=3.0,
    default_sampler="euler",
    samplers=("euler",),
    decoders=(DecoderKind.TINY,),
    default_decoder=DecoderKind.TINY,
    max_prompt_tokens=32,
    latent_channels=4,
    latent_factor=8,
)
