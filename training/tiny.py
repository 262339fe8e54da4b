"""Phase `tiny`: a small autoencoder for the same scaled latents, for previews and for decoding on CPUs."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from training.drawing import draw
from training.figures import gate, record_figures
from training.loop import LoopConfig, TrainingLoop
from training.networks import LATENT_PX, new_tiny_vae
from training.parts import STATE_DIR, device, half_copy, load_tiny, load_vae, write_part
from training.vae import psnr_db, random_layout

GATE_PSNR_DB = 28.0
GATE_FLOP_RATIO = 3.0
LATENT_NOISE = 0.03  # sampled latents are a little off the encoder's
CONFIG = LoopConfig(steps=1600, batch=8, learning_rate=2e-3, ema_decay=0.995, weight_decay=0.0)


@torch.no_grad()
def _drawings_and_latents(
    vae: AutoencoderKL, count: int, generator: torch.Generator, *, held_out: bool
) -> tuple[Tensor, Tensor]:
    drawings = draw(random_layout(count, generator, held_out=held_out)).to(device())
    return drawings, vae.encode(drawings).latent_dist.mean * vae.config.scaling_factor


def train(vae: AutoencoderKL) -> AutoencoderTiny:
    """Trains both halves against the full autoencoder's latents; returns the average."""
    torch.manual_seed(CONFIG.seed)
    tiny = new_tiny_vae().to(device())
    loop = TrainingLoop("tiny", tiny, CONFIG, state_file=STATE_DIR / "tiny.safetensors")

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        drawings, latents = _drawings_and_latents(vae, CONFIG.batch, generator, held_out=False)
        noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator).to(latents)
        decoded = tiny.decode(latents + noise).sample
        encoded = tiny.encode(drawings).latents
        return F.l1_loss(decoded, drawings) + F.mse_loss(decoded, drawings) + 0.2 * F.mse_loss(encoded, latents)

    loop.run(step_loss)
    return loop.averaged_copy()


@torch.no_grad()
def decoder_psnr_db(vae: AutoencoderKL, tiny: AutoencoderTiny, *, images: int = 256) -> float:
    """Mean PSNR of the small decoder on the full encoder's latents of held-out drawings."""
    generator = torch.Generator().manual_seed(2)
    values = []
    for _ in range(images // 32):
        drawings, latents = _drawings_and_latents(vae, 32, generator, held_out=True)
        values.append(psnr_db(tiny.decode(latents).sample, drawings))
    return round(float(torch.cat(values).mean()), 2)


@torch.no_grad()
def decoder_mflop(vae: AutoencoderKL | AutoencoderTiny) -> float:
    """Millions of floating-point operations to decode one image of 128 px."""
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.zeros(1, 4, LATENT_PX, LATENT_PX, device=device()))
    return round(counter.get_total_flops() / 1e6, 1)


def run() -> None:
    """Trains, writes models/shapes/tiny_vae and checks both gates."""
    vae = load_vae().eval()
    write_part(half_copy(train(vae)), "tiny_vae")
    tiny = load_tiny().eval()
    figure, full_mflop, tiny_mflop = decoder_psnr_db(vae, tiny), decoder_mflop(vae), decoder_mflop(tiny)
    gate("tiny", "FLOP ratio full/tiny decoder", round(full_mflop / tiny_mflop, 2), GATE_FLOP_RATIO)
    gate("tiny", "PSNR, dB", figure, GATE_PSNR_DB)
    record_figures("tiny", {"psnr_db": figure, "decoder_mflop": tiny_mflop, "full_decoder_mflop": full_mflop})
