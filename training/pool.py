"""The pool of encoded drawings that the flow is trained on: encoding each step anew would double the time of a step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from training.captions import random_caption
from training.drawing import Scene, draw, lay_out, sample_scenes
from training.loop import progress
from training.parts import STATE_DIR, device, load_text, load_vae
from training.text import embed, tokenize

DRAWINGS = 16_000
CAPTIONS_EACH = 3
SEED = 5
_BATCH = 32


@dataclass(frozen=True)
class Pool:
    """latents [N, 4, 16, 16] (scaled) and, per drawing, embeddings [N, 3, 32, 128] of three captions; float16."""

    latents: Tensor
    embeddings: Tensor

    def batch(self, rows: Tensor, variants: Tensor) -> tuple[Tensor, Tensor]:
        """float32 latents and embeddings of these rows, on the training device."""
        return self.latents[rows].to(device()).float(), self.embeddings[rows, variants].to(device()).float()


def open_pool() -> Pool:
    """The pool, from out/training where it is there; its captions are drawn and embedded each time."""
    rng = np.random.default_rng(SEED)
    scenes = sample_scenes(DRAWINGS, rng)
    path = STATE_DIR / "pool.safetensors"
    if not path.exists():
        _encode_drawings(scenes, path)
    tokenizer, encoder = load_text()
    captions = [random_caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_EACH)]
    embeddings = embed_all(encoder, tokenize(tokenizer, captions))
    return Pool(load_file(path)["latents"], embeddings.unflatten(0, (DRAWINGS, CAPTIONS_EACH)))


@torch.no_grad()
def embed_all(encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Embeddings [N, 32, 128] in float16 of tokens [N, 32]."""
    return torch.cat([embed(encoder, part.to(device())).half().cpu() for part in tokens.split(256)])


@torch.no_grad()
def _encode_drawings(scenes: list[Scene], path: Path) -> None:
    vae = load_vae().eval()
    rng = np.random.default_rng(SEED + 1)
    latents = []
    with progress("pool", total=len(scenes) // _BATCH, per_step=_BATCH) as advance:
        for start in range(0, len(scenes), _BATCH):
            drawings = draw(lay_out(scenes[start : start + _BATCH], rng)).to(device())
            latents.append((vae.encode(drawings).latent_dist.mean * vae.config.scaling_factor).half().cpu())
            advance(0.0)
    save_file({"latents": torch.cat(latents)}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
