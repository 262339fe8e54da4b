"""Classifier-free guidance over packed rows."""

from __future__ import annotations

from torch import Tensor


def combine_guidance(conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor) -> Tensor:
    """`o_u + g (o_c - o_u)` (Ho and Salimans, "Classifier-free diffusion guidance").

    Args:
        conditional, unconditional: [n, C, H, W].
        guidance_scale: [n, 1, 1, 1].
    """
    return unconditional + guidance_scale * (conditional - unconditional)
