"""Phase `pairs`: noise and what the base model draws from it, for reflow.

In chunks, each a pure function of its number, so that two processes can share the work, one counting up and one down:
`python -m training reflow & python -m training pairs --backwards`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.attributes import agrees, predictions
from training.classifier import ShapesClassifier, load_classifier
from training.loop import progress
from training.parts import STATE_DIR, device, load_text, load_unet, load_vae
from training.pool import embed_all
from training.sampling import decode, heun, initial_noise
from training.text import caption_set, tokenize

CHUNKS = 32
CHUNK = 128
STEPS = 7
GUIDANCE_SCALE = 2.0
_SEED = 1_000_000


def chunk_path(index: int) -> Path:
    return STATE_DIR / "pairs" / f"{index:03d}.safetensors"


class PairMaker:
    """Draws from noise with the finished base model, and keeps what the classifier finds to be as the caption says.

    Guidance is drawn into the pairs, so that the reflowed model needs none. Empty captions are drawn without, so that
    guidance and negative prompts keep their effect on it.
    """

    def __init__(self) -> None:
        self._text: tuple[CLIPTokenizer, CLIPTextModel] = load_text()
        self._unet: UNet2DConditionModel = load_unet("unet_base").eval()
        self._vae: AutoencoderKL = load_vae().eval()
        self._classifier: ShapesClassifier = load_classifier()

    @torch.no_grad()
    def make(self, index: int) -> dict[str, Tensor]:
        """noise and data [N, 4, 16, 16] (float32, float16) and tokens [N, 32]; N <= CHUNK after the selection."""
        captions, wanted = caption_set(CHUNK, _SEED + index, held_out=False)
        tokens = tokenize(self._text[0], [*captions, ""])
        embeddings = embed_all(self._text[1], tokens).float().to(device())
        noise = initial_noise(CHUNK, _SEED + index).to(device())
        data = torch.empty_like(noise)
        empty = torch.tensor([not caption for caption in captions], device=device())
        for rows, guidance_scale in ((~empty, GUIDANCE_SCALE), (empty, 1.0)):
            with torch.autocast(noise.device.type, dtype=torch.bfloat16):
                data[rows] = heun(
                    self._unet,
                    noise[rows],
                    embeddings[:-1][rows],
                    embeddings[-1:],
                    steps=STEPS,
                    guidance_scale=guidance_scale,
                )
        seen = predictions(self._classifier(decode(self._vae, data))[1])
        kept = agrees(seen, wanted.to(device())).cpu()
        return {"noise": noise.cpu()[kept], "data": data.cpu()[kept], "tokens": tokens[:-1][kept]}


def make_pairs(*, backwards: bool = False) -> None:
    """Makes the chunks that are not there yet, from the first up or from the last down."""
    order = sorted(range(CHUNKS), reverse=backwards)
    missing = sum(not chunk_path(index).exists() for index in order)
    if not missing:
        return
    maker = PairMaker()
    chunk_path(0).parent.mkdir(parents=True, exist_ok=True)
    with progress("pairs", total=missing, per_step=CHUNK) as advance:
        for index in order:
            if chunk_path(index).exists():  # by now: another process may count the other way
                continue
            chunk = maker.make(index)
            temporary = chunk_path(index).with_suffix(f".{os.getpid()}.tmp")
            save_file(chunk, temporary)
            os.replace(temporary, chunk_path(index))
            advance(1 - len(chunk["noise"]) / CHUNK)  # shown as the loss: the share that was turned down


def load_pairs() -> dict[str, Tensor]:
    """All pairs of all chunks."""
    chunks = [load_file(chunk_path(index)) for index in range(CHUNKS)]
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
