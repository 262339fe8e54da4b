"""Plain samplers for looking at, measuring and reflowing the model; serving has its own."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from training.networks import LATENT_PX


def initial_noise(count: int, seed: int) -> Tensor:
    """Latents [B, 4, 16, 16] at sigma 1."""
    return torch.randn(count, 4, LATENT_PX, LATENT_PX, generator=torch.Generator().manual_seed(seed))


def guided_velocity(
    unet: UNet2DConditionModel, latents: Tensor, sigma: float, embeddings: Tensor, empty: Tensor, guidance_scale: float
) -> Tensor:
    """o_u + g (o_c - o_u), or one conditional row when g <= 1. `empty` [1, 32, 128] embeds the empty prompt."""
    timestep = torch.full((len(latents),), 1000.0 * sigma, device=latents.device)
    if guidance_scale <= 1:
        return unet(latents, timestep, embeddings).sample
    both = torch.cat([empty.expand_as(embeddings), embeddings])
    unguided, told = unet(torch.cat([latents] * 2), torch.cat([timestep] * 2), both).sample.chunk(2)
    return unguided + guidance_scale * (told - unguided)


@torch.no_grad()
def euler(
    unet: UNet2DConditionModel, noise: Tensor, embeddings: Tensor, empty: Tensor, *, steps: int, guidance_scale: float
) -> Tensor:
    """Scaled latents [B, 4, 16, 16] at sigma 0, by Euler steps over sigma = 1, 1 - 1/N, ..., 0."""
    latents = noise.clone()
    for step in range(steps):
        velocity = guided_velocity(unet, latents, 1 - step / steps, embeddings, empty, guidance_scale)
        latents = latents - velocity / steps
    return latents


@torch.no_grad()
def heun(
    unet: UNet2DConditionModel, noise: Tensor, embeddings: Tensor, empty: Tensor, *, steps: int, guidance_scale: float
) -> Tensor:
    """As `euler`, with the trapezoidal correction (the last step, whose end is at sigma 0, included)."""
    latents = noise.clone()
    for step in range(steps):
        velocity = guided_velocity(unet, latents, 1 - step / steps, embeddings, empty, guidance_scale)
        ahead = latents - velocity / steps
        after = guided_velocity(unet, ahead, 1 - (step + 1) / steps, embeddings, empty, guidance_scale)
        latents = latents - (velocity + after) / (2 * steps)
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [B, 3, 128, 128] in -1..1 of scaled latents."""
    return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


def write_sheet(images: Tensor, path: Path, *, columns: int = 8) -> None:
    """A contact sheet of images [B, 3, H, W] in -1..1; B is a multiple of the columns."""
    rows, (channels, height, width) = len(images) // columns, images.shape[1:]
    grid = images.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = ((grid.reshape(rows * height, columns * width, channels) + 1) * 127.5).round().clamp(0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.byte().cpu().numpy()).save(path)
