"""Phase `vae`: the autoencoder whose latents the flow is trained on."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training.drawing import IMAGE_PX, Layout, draw, lay_out, sample_scenes
from training.figures import gate, record_figures
from training.loop import LoopConfig, TrainingLoop
from training.networks import new_vae
from training.parts import STATE_DIR, device, half_copy, load_vae, write_part

CROP_PX = 64
FULL_SIZE_FROM = (
    0.86  # share of the steps after which whole drawings are seen, so that GroupNorm meets their statistics
)
KL_WEIGHT = 3e-4
GATE_PSNR_DB = 30.0
FULL_SIZE_BATCH = 10
CONFIG = LoopConfig(steps=3000, batch=32, learning_rate=2e-3, ema_decay=0.995)


def random_layout(count: int, generator: torch.Generator, *, held_out: bool = False) -> Layout:
    """Jittered layouts of random scenes, seeded from a torch generator."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    rng = np.random.default_rng(seed)
    return lay_out(sample_scenes(count, rng, held_out=held_out), rng)


def random_crops(count: int, generator: torch.Generator) -> Tensor:
    """Windows [B, 3, 64, 64] on drawings, around a shape: plain background teaches little."""
    layout = random_layout(count, generator)
    second = (torch.rand(count, generator=generator) < 0.5) & (layout.radius[:, 1] > 0)
    center = layout.center[torch.arange(count), second.long()]
    origin = center - CROP_PX / 2 + (torch.rand(count, 2, generator=generator) - 0.5) * CROP_PX * 0.8
    return draw(layout, size_px=CROP_PX, origin=origin.round().clamp(0, IMAGE_PX - CROP_PX))


def loss_of(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + MSE + a light KL term; the latents are sampled, which keeps the decoder smooth around them."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + KL_WEIGHT * divergence


def train() -> AutoencoderKL:
    """Trains on crops, then on whole drawings, from the saved state where there is one; returns the averaged model."""
    torch.manual_seed(CONFIG.seed)
    vae = new_vae().to(device())
    loop = TrainingLoop("vae", vae, CONFIG, state_file=STATE_DIR / "vae.safetensors")
    full_from = round(CONFIG.steps * FULL_SIZE_FROM)

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        if step < full_from:
            images = random_crops(CONFIG.batch, generator)
        else:
            images = draw(random_layout(FULL_SIZE_BATCH, generator))
        return loss_of(vae, images.to(device()), generator)

    loop.run(step_loss)
    return loop.averaged_copy()


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, *, images: int = 512) -> float:
    """1 / the standard deviation of the latents of training drawings (their mean is near 0 thanks to the KL term)."""
    generator = torch.Generator().manual_seed(1)
    batches = [draw(random_layout(32, generator)).to(device()) for _ in range(images // 32)]
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches])
    return round(1 / float(latents.std()), 4)


def psnr_db(images: Tensor, references: Tensor) -> Tensor:
    """PSNR [B] of images in -1..1, in dB."""
    error = (images.clamp(-1, 1) - references).square().flatten(1).mean(1) / 4
    return -10 * error.log10()


@torch.no_grad()
def reconstruction_psnr_db(vae: AutoencoderKL, *, images: int = 256) -> float:
    """Mean PSNR over whole held-out drawings, encoded to the posterior's mean and decoded."""
    generator = torch.Generator().manual_seed(2)
    values = []
    for _ in range(images // 32):
        drawings = draw(random_layout(32, generator, held_out=True)).to(device())
        values.append(psnr_db(vae.decode(vae.encode(drawings).latent_dist.mean).sample, drawings))
    return round(float(torch.cat(values).mean()), 2)


def run() -> None:
    """Trains, sets the scaling factor, writes models/shapes/vae and checks the gate."""
    vae = train()
    vae.register_to_config(scaling_factor=latent_scale(vae))
    write_part(half_copy(vae), "vae")
    figure = reconstruction_psnr_db(load_vae())
    gate("vae", "PSNR, dB", figure, GATE_PSNR_DB)
    record_figures("vae", {"psnr_db": figure, "scaling_factor": vae.config.scaling_factor})
