"""Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.checkpoints.autoencoders import make_tiny, make_vae
from tests.checkpoints.text import make_clip, make_tokenizer


def save_sd_checkpoint(folder: Path, *, shift: float = 1.0, diffusion: bool = False) -> Path:
    """A Stable Diffusion checkpoint of two levels: 64 x 64 pixels, latents 4 x 16 x 16, 12 tokens of width 16.

    Args:
        shift: of its flow-matching scheduler.
        diffusion: the scheduler is that of a diffusion model, beside which PeRFlow and InstaFlow are published.
    """
    torch.manual_seed(0)
    unet, vae, tiny = make_unet(), make_vae(), make_tiny()
    tokenizer = make_tokenizer(folder / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_clip(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusion_scheduler() if diffusion else FlowMatchEulerDiscreteScheduler(shift=shift),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    tiny.save_pretrained(folder / "tiny_vae")
    refiner = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    refiner.register_to_config(max_step=0.25)
    refiner.save_pretrained(folder / "unet_refiner")
    return folder


def save_sdxl_checkpoint(folder: Path) -> Path:
    """A Stable Diffusion XL checkpoint: 64 x 64 pixels, 12 tokens of width 16 + 24, as PeRFlow is published."""
    torch.manual_seed(0)
    first, second = make_tokenizer(folder / "tokenizer"), make_tokenizer(folder / "tokenizer_2")
    pooled, time_width = 20, 4
    unet = make_unet(
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=pooled + 6 * time_width,
    )
    StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_clip(first),
        tokenizer=first,
        text_encoder_2=make_clip(second, 24, projection=pooled),
        tokenizer_2=second,
        unet=unet,
        scheduler=diffusion_scheduler(),
    ).save_pretrained(folder)
    return folder


def diffusion_scheduler() -> PNDMScheduler:
    """As checkpoints of Stable Diffusion have it."""
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
    )


def make_unet(**changed: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | changed))
