"""Phase `decoder`: the VAE's decoder trained on alone, on whole drawings.

The encoder stays, so the latents do, and the flow can train at the same time.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training.drawing import draw
from training.figures import gate, record_figures
from training.loop import LoopConfig, TrainingLoop
from training.parts import STATE_DIR, device, half_copy, load_vae, write_part
from training.vae import random_layout, reconstruction_psnr_db

LATENT_NOISE = 0.05  # in scaled latents: about what few sampling steps leave
GATE_PSNR_DB = 33.0
CONFIG = LoopConfig(steps=900, batch=10, learning_rate=1.5e-3, ema_decay=0.995, seed=1)


def train() -> AutoencoderKL:
    """Trains from the saved state where there is one; returns the averaged model."""
    vae = load_vae().train()
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    loop = TrainingLoop("decoder", vae, CONFIG, state_file=STATE_DIR / "decoder.safetensors")

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        drawings = draw(random_layout(CONFIG.batch, generator)).to(device())
        with torch.no_grad():
            latents = vae.encode(drawings).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        decoded = vae.decode(latents + LATENT_NOISE / vae.config.scaling_factor * noise).sample
        return F.l1_loss(decoded, drawings) + 2 * F.mse_loss(decoded, drawings)

    loop.run(step_loss)
    return loop.averaged_copy()


def run() -> None:
    """Trains, replaces models/shapes/vae and checks the gate."""
    write_part(half_copy(train()), "vae")
    figure = reconstruction_psnr_db(load_vae())
    gate("decoder", "PSNR, dB", figure, GATE_PSNR_DB)
    record_figures("decoder", {"psnr_db": figure})
