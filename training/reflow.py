"""Phase `reflow`: the UNet trained on from the base along straight lines between noise and what the base drew from it.

After 2-rectified flow (Liu et al., "Flow Straight and Fast", section 2.2): the pairs are the flow's own, so the lines
hardly cross, the velocity is nearly constant along each, and one to four Euler steps do.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from training.evaluate import Setting, measure
from training.figures import gate, record_figures
from training.flow import velocity_loss
from training.loop import LoopConfig, TrainingLoop
from training.pairs import load_pairs, make_pairs
from training.parts import STATE_DIR, device, half_copy, load_text, load_unet, write_part
from training.pool import embed_all
from training.samples import write_samples

START_SHARE = 0.3  # share of the steps at sigma 1, where a one-step sampler spends its only step
GATE_ACCURACY = 0.85
GATE_STEPS = 2
CONFIG = LoopConfig(steps=1500, batch=32, learning_rate=4e-4, ema_decay=0.99)


def train() -> UNet2DConditionModel:
    """Trains from the saved state where there is one; returns the average."""
    torch.manual_seed(CONFIG.seed)
    unet = load_unet("unet_base").train()
    loop = TrainingLoop("reflow", unet, CONFIG, state_file=STATE_DIR / "reflow.safetensors")
    pairs = load_pairs()
    embeddings = embed_all(load_text()[1], pairs["tokens"])

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(embeddings), (CONFIG.batch,), generator=generator)
        at_start = torch.rand(CONFIG.batch, generator=generator) < START_SHARE
        sigmas = torch.where(at_start, torch.ones(CONFIG.batch), torch.rand(CONFIG.batch, generator=generator))
        data, noise, told = (
            values[rows].float().to(device()) for values in (pairs["data"], pairs["noise"], embeddings)
        )
        return velocity_loss(unet, data, noise, sigmas.to(device()), told)

    loop.run(step_loss)
    return loop.averaged_copy()


def run() -> None:
    """Makes the pairs that are missing, trains, replaces models/shapes/unet and checks the gate."""
    make_pairs()
    unet = train()
    write_part(half_copy(unet), "unet")
    write_samples(unet, STATE_DIR / "reflow.png", steps=GATE_STEPS, guidance_scale=1.0)
    figures = measure(Setting("unet", steps=GATE_STEPS, guidance_scale=1.0, images=500))
    gate("reflow", f"attribute accuracy at {GATE_STEPS} steps, guidance 1", figures["accuracy"], GATE_ACCURACY)
    record_figures("reflow", figures)
