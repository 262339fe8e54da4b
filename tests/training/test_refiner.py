"""The refiners: nothing untrained, and a good part of the change of velocity once trained."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from training.networks import new_refiner
from training.parts import MODEL_DIR, load_text, load_unet
from training.pool import embed_all
from training.refiner import MAX_STEP, REFINED, Refined
from training.sampling import euler, guided_velocity, initial_noise
from training.text import tokenize

CAPTIONS = [
    "a large red circle at the left on a white background",
    "a small cyan star above a small orange ring on a gray background",
    "a large yellow triangle in the center on a navy background",
    "a small pink square left of a large blue ring on a white background",
]


def test_an_untrained_refiner_reuses_the_velocity() -> None:
    refiner = new_refiner(max_step=MAX_STEP)
    assert refiner.config.max_step == MAX_STEP
    seen = torch.randn(2, 8, 16, 16)
    change = refiner(seen, torch.tensor([500.0, 20.0]), torch.randn(2, 32, 128)).sample
    assert change.shape == (2, 4, 16, 16)
    assert not change.any()


@pytest.mark.parametrize("refined", REFINED, ids=[refined.refiner for refined in REFINED])
@torch.no_grad()
def test_the_shipped_refiners_explain_most_of_the_change_on_the_models_own_paths(refined: Refined) -> None:
    unet = load_unet(refined.unet).eval()
    refiner = UNet2DConditionModel.from_pretrained(MODEL_DIR / refined.refiner, dtype=torch.float32).eval()
    assert refiner.num_parameters() < 0.05 * unet.num_parameters()
    tokenizer, encoder = load_text()
    embeddings = embed_all(encoder, tokenize(tokenizer, [*CAPTIONS, ""])).float()
    told, empty = embeddings[:-1], embeddings[-1:]
    noise = initial_noise(len(told), 123)
    for scale in refined.guidance_scales:
        data = euler(unet, noise, told, empty, steps=8, guidance_scale=scale)
        error, change = 0.0, 0.0
        for sigma, step in ((0.9, 0.1), (0.6, 0.2), (0.4, 0.1), (0.2, 0.1), (0.1, 0.1)):
            # Near the path, which is straight between noise and data up to what reflow left.
            latents = (1 - sigma) * data + sigma * noise
            velocity = guided_velocity(unet, latents, sigma, told, empty, scale)
            ahead = latents - step * velocity
            after = guided_velocity(unet, ahead, sigma - step, told, empty, scale)
            timestep = torch.full((len(told),), 1000 * (sigma - step))
            predicted = refiner(torch.cat([ahead, velocity], dim=1), timestep, told).sample
            error += float((velocity + predicted - after).square().sum())
            change += float((velocity - after).square().sum())
        assert 1 - error / change > refined.gate - 0.1, scale
