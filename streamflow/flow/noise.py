"""Noise that depends on an image's seed alone: never on the batch, the neighbours or the device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SEED_RANGE = 2**64


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a request, so that any image can be made again alone."""
    return (seed + index) % SEED_RANGE


def initial_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 of `shape` on the CPU: what diffusers draws for a generator with this seed."""
    return torch.randn(shape, generator=_generator(seed))


def drawn_noise(seed: int, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Noise number `draw` (from 0) that a stochastic sampler adds on the way; independent of the initial noise."""
    digest = hashlib.sha256(f"streamflow draw {seed} {draw}".encode()).digest()
    return torch.randn(shape, generator=_generator(int.from_bytes(digest[:8], "little")))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
