"""Stable Diffusion 3, FLUX and SiT: 64 x 64 pixels, latents of 16 x 16."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.checkpoints.autoencoders import FACTOR, make_tiny, make_vae
from tests.checkpoints.text import T5_TOKENS, make_clip, make_t5, make_t5_tokenizer, make_tokenizer

WIDTH, LATENTS = 32, 16


def save_sd3_checkpoint(folder: Path, *, t5: bool = True) -> Path:
    torch.manual_seed(0)
    first, second = make_tokenizer(folder / "tokenizer"), make_tokenizer(folder / "tokenizer_2")
    third = make_t5_tokenizer() if t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=LATENTS,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=12 + 10,
        pos_embed_max_size=24,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(8, shift=0.06),
        text_encoder=make_clip(first, 16, projection=12),
        tokenizer=first,
        text_encoder_2=make_clip(second, 8, projection=10),
        tokenizer_2=second,
        text_encoder_3=make_t5(third, WIDTH) if third else None,
        tokenizer_3=third,
    ).save_pretrained(folder)
    make_tiny(8).save_pretrained(folder / "tiny_vae")
    return recommend(folder, t5_tokens=T5_TOKENS)


def save_flux_checkpoint(folder: Path, *, distilled_guidance: bool = True) -> Path:
    """Args: distilled_guidance: FLUX.1 dev, else schnell."""
    torch.manual_seed(0)
    first, second = make_tokenizer(folder / "tokenizer"), make_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=distilled_guidance,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if distilled_guidance else 1.0, use_dynamic_shifting=distilled_guidance, max_shift=1.15
        ),
        vae=make_vae(4, shift=0.1),
        text_encoder=make_clip(first, 16),
        tokenizer=first,
        text_encoder_2=make_t5(second, WIDTH),
        tokenizer_2=second,
    ).save_pretrained(folder)
    return recommend(folder, t5_tokens=T5_TOKENS, default_size=LATENTS * FACTOR, max_width=256, max_height=256)


def save_sit_checkpoint(folder: Path) -> Path:
    """SiT in the layout of DiT, with a refiner: 10 classes."""
    torch.manual_seed(0)
    DiTPipeline(
        transformer=make_dit(num_layers=2, in_channels=4), vae=make_vae(), scheduler=FlowMatchEulerDiscreteScheduler()
    ).save_pretrained(folder)
    refiner = make_dit(num_layers=1, in_channels=8)
    refiner.register_to_config(max_step=0.25)
    refiner.save_pretrained(folder / "transformer_refiner")
    return folder


def make_dit(*, num_layers: int, in_channels: int) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=in_channels,
        out_channels=8,
        num_layers=num_layers,
        sample_size=LATENTS,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    # Its last layers and gates begin at zero, which would hide what comes before.
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    return model


def recommend(folder: Path, **settings: object) -> Path:
    (folder / "streamflow.json").write_text(json.dumps(settings))
    return folder
