"""Contact sheets of a few captions, to look at."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DConditionModel

from training.parts import device, load_text, load_vae
from training.pool import embed_all
from training.sampling import decode, euler, initial_noise, write_sheet
from training.text import tokenize

SHEET_CAPTIONS = (
    "a large red circle at the left on a white background",
    "a small cyan star above a small orange ring on a gray background",
    "a red circle on a white background",
    "a large blue square left of a large yellow cross on a black background",
    "a small green triangle at the top on a navy background",
    "red circle",
    "a large pink ring above a small purple square on a white background",
    "",
)


def write_samples(unet: UNet2DConditionModel, path: Path, *, steps: int, guidance_scale: float) -> None:
    """A contact sheet: a column for each of SHEET_CAPTIONS, three noises each."""
    tokenizer, encoder = load_text()
    embeddings = embed_all(encoder, tokenize(tokenizer, [*SHEET_CAPTIONS, ""])).to(device()).float()
    noise = initial_noise(24, seed=0).to(device())
    wanted = embeddings[:-1].repeat(3, 1, 1)
    latents = euler(unet, noise, wanted, embeddings[-1:], steps=steps, guidance_scale=guidance_scale)
    write_sheet(decode(load_vae(), latents), path)
