"""Networks of the shapes of well-known models, with random weights: how fast they are does not depend on the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamflow.families.libraries import from_diffusers, from_transformers
from tests.checkpoints import make_tokenizer

TOKENS = 77


def save_sd15(folder: Path, *, small: bool = False) -> Path:
    """A checkpoint of Stable Diffusion 1.5's shape, with a flow scheduler and a tiny autoencoder.

    Args:
        small: a hundredth of it, to try what runs it.
    """
    torch.manual_seed(0)
    widths, width = ((32, 64), 32) if small else ((320, 640, 1280, 1280), 768)
    levels = len(widths)
    unet = from_diffusers("UNet2DConditionModel")(
        sample_size=16 if small else 64,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    pictures = (32,) * 4 if small else (128, 256, 512, 512)
    vae = from_diffusers("AutoencoderKL")(
        block_out_channels=pictures,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=128 if small else 512,
    )
    tokenizer = make_tokenizer(folder / "tokenizer", TOKENS)
    heads, layers = (2, 2) if small else (12, 12)
    text = from_transformers("CLIPTextModel")(
        from_transformers("CLIPTextConfig")(
            vocab_size=len(tokenizer) if small else 49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    from_diffusers("StableDiffusionPipeline")(
        vae=vae.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=from_diffusers("FlowMatchEulerDiscreteScheduler")(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    tiny = from_diffusers("AutoencoderTiny")(scaling_factor=1.0).half()
    tiny.save_pretrained(folder / "tiny_vae")
    return folder


@dataclass(frozen=True)
class Shape:
    """A denoising network alone.

    Attributes:
        make: on the device, in the precision.
        inputs: (rows, pixels of a side, device, dtype) -> keyword arguments, with a timestep in every row.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, torch.device, torch.dtype], Mapping[str, Tensor]]

    def load(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return self.make().eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


def _sd15() -> nn.Module:
    return from_diffusers("UNet2DConditionModel")(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )


def _sd15_inputs(rows: int, size_px: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    draw = _drawer(device, dtype)
    return {
        "sample": draw(rows, 4, size_px // 8, size_px // 8),
        "timestep": torch.linspace(1000, 250, rows, device=device),
        "encoder_hidden_states": draw(rows, TOKENS, 768),
    }


def _sd3() -> nn.Module:
    return from_diffusers("SD3Transformer2DModel")(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


def _sd3_inputs(rows: int, size_px: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    draw = _drawer(device, dtype)
    return {
        "hidden_states": draw(rows, 16, size_px // 8, size_px // 8),
        "timestep": torch.linspace(1000, 250, rows, device=device),
        "encoder_hidden_states": draw(rows, 333, 4096),
        "pooled_projections": draw(rows, 2048),
    }


def _flux() -> nn.Module:
    return from_diffusers("FluxTransformer2DModel")(guidance_embeds=True)


def _flux_inputs(rows: int, size_px: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    draw, side = _drawer(device, dtype), size_px // 16
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).reshape(-1, 2)
    places = torch.cat([torch.zeros(len(grid), 1), grid], dim=1)
    return {
        "hidden_states": draw(rows, side * side, 64),
        "timestep": torch.linspace(1, 0.25, rows, device=device, dtype=dtype),
        "guidance": torch.full((rows,), 3.5, device=device, dtype=dtype),
        "encoder_hidden_states": draw(rows, 512, 4096),
        "pooled_projections": draw(rows, 768),
        "img_ids": places.to(device, dtype),
        "txt_ids": torch.zeros(512, 3, device=device, dtype=dtype),
    }


def _drawer(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, device=device, dtype=dtype)


SHAPES = {
    "sd15": Shape(_sd15, _sd15_inputs),
    "sd3": Shape(_sd3, _sd3_inputs),
    "flux": Shape(_flux, _flux_inputs),
}
