"""Phase `flow`: the UNet that predicts the velocity, with the text encoder frozen."""

from __future__ import annotations

import time

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from training.evaluate import Setting, measure
from training.figures import gate, record_figures
from training.loop import LoopConfig, TrainingLoop
from training.networks import new_unet
from training.parts import STATE_DIR, device, half_copy, write_part
from training.pool import Pool, open_pool
from training.samples import write_samples

EXPORT_EVERY_S = 600.0
CONFIG = LoopConfig(steps=5800, batch=32, learning_rate=1.0e-3, warmup=0.06, ema_decay=0.998)
GATE_ACCURACY = 0.85  # at 8 steps, before reflow; the headline's gate is evaluate's


def random_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [B]: logit-normal, with a quarter uniform and a tenth at 1 exactly, where every image starts."""
    sigmas = torch.sigmoid(torch.randn(count, generator=generator))
    kind = torch.rand(count, generator=generator)
    sigmas = torch.where(kind < 0.25, torch.rand(count, generator=generator), sigmas)
    return torch.where(kind > 0.9, torch.ones(count), sigmas)


def velocity_loss(
    unet: UNet2DConditionModel, data: Tensor, noise: Tensor, sigmas: Tensor, embeddings: Tensor
) -> Tensor:
    """Mean squared error of the velocity noise - data at x = (1 - sigma) data + sigma noise."""
    sigma = sigmas[:, None, None, None]
    noisy = (1 - sigma) * data + sigma * noise
    # bfloat16 products take a sixth off a step on CPUs that have them; the weights stay float32.
    with torch.autocast(data.device.type, dtype=torch.bfloat16):
        velocity = unet(noisy, 1000 * sigmas, embeddings).sample
    return F.mse_loss(velocity.float(), noise - data)


def pool_loss(unet: UNet2DConditionModel, pool: Pool, batch: int, generator: torch.Generator) -> Tensor:
    """The velocity loss on a random batch of the pool."""
    rows = torch.randint(len(pool.latents), (batch,), generator=generator)
    variants = torch.randint(pool.embeddings.shape[1], (batch,), generator=generator)
    data, embeddings = pool.batch(rows, variants)
    noise = torch.randn(data.shape, generator=generator).to(data)
    return velocity_loss(unet, data, noise, random_sigmas(batch, generator).to(data), embeddings)


def train() -> UNet2DConditionModel:
    """Trains from the saved state where there is one, exporting the average now and then; returns the average."""
    torch.manual_seed(CONFIG.seed)
    unet = new_unet().to(device())
    loop = TrainingLoop("flow", unet, CONFIG, state_file=STATE_DIR / "flow.safetensors")
    pool = open_pool()
    exported_at = time.monotonic()

    def export() -> None:
        nonlocal exported_at
        if time.monotonic() - exported_at > EXPORT_EVERY_S or loop.step == CONFIG.steps:
            with loop.averaged():
                write_part(half_copy(unet), "unet")
                write_samples(unet, STATE_DIR / f"flow_{loop.step:05d}.png", steps=8, guidance_scale=2.0)
            exported_at = time.monotonic()

    loop.run(lambda step, generator: pool_loss(unet, pool, CONFIG.batch, generator), on_save=export)
    return loop.averaged_copy()


def run() -> None:
    """Trains, writes models/shapes/unet_base (and unet, until reflow replaces it), and checks the gate."""
    unet = train()
    write_part(half_copy(unet), "unet_base")
    write_part(half_copy(unet), "unet")
    figures = measure(Setting("unet_base", steps=8, guidance_scale=2.0, images=500))
    gate("flow", "attribute accuracy at 8 steps, guidance 2", figures["accuracy"], GATE_ACCURACY)
    record_figures("flow", figures)
