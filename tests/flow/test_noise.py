"""Noise is a pure function of the seed."""

from __future__ import annotations

import torch

from streamflow.flow.noise import drawn_noise, image_seed, initial_noise

SHAPE = (4, 8, 8)


def test_initial_noise_is_what_the_reference_draws() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    expected = randn_tensor((1, *SHAPE), generator=[torch.Generator("cpu").manual_seed(7)], dtype=torch.float32)
    assert torch.equal(initial_noise(7, SHAPE), expected[0])


def test_image_seed_wraps_at_64_bits_and_every_seed_draws() -> None:
    assert image_seed(2**64 - 1, 1) == 0
    for seed in (0, 2**63, 2**64 - 1):
        assert torch.isfinite(initial_noise(seed, SHAPE)).all()


def test_draws_differ_from_each_other_and_from_the_initial_noise_and_repeat() -> None:
    draws = [initial_noise(3, SHAPE), *(drawn_noise(3, k, SHAPE) for k in range(4)), drawn_noise(4, 0, SHAPE)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)
    assert torch.equal(drawn_noise(3, 2, SHAPE), draws[3])
