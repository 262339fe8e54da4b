"""Phase `text`: the tokenizer, and a text encoder taught alone to read a caption's whole structure.

From the end token on, every position must tell all attributes of the scene through linear heads. The flow then only
has to draw what it is told; learning to bind attributes to items through the drawing loss took most of its time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from training.attributes import CLASS_COUNTS, attribute_loss, labels, predictions
from training.captions import DROPPED, describe, told
from training.drawing import Scene, sample_scenes
from training.figures import gate, record_figures
from training.loop import LoopConfig, TrainingLoop
from training.networks import TEXT_WIDTH, TOKENS, new_text_encoder
from training.parts import STATE_DIR, device, half_copy, load_text, write_part
from training.tokenizer import new_tokenizer

CAPTIONS = 40_000
GATE_ACCURACY = 0.99
CONFIG = LoopConfig(steps=800, batch=128, learning_rate=1.5e-3, ema_decay=0.99)


class Reader(nn.Module):
    """The text encoder with the heads that it is taught through."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.Linear(TEXT_WIDTH, sum(CLASS_COUNTS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 32] to logits [B, 32, classes]."""
        return self.heads(embed(self.encoder, tokens))


def embed(encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Prompt embeddings [B, 32, 128] exactly as diffusers' pipeline makes them: every position, no attention mask."""
    return encoder(tokens)[0]


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Tokens [B, 32], padded with end tokens."""
    encoded = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def caption_set(count: int, seed: int, *, held_out: bool) -> tuple[list[str], Tensor]:
    """Random captions and the labels [count, 8] of what they tell."""
    rng = np.random.default_rng(seed)
    scenes = [told(scene, rng) for scene in sample_scenes(count, rng, held_out=held_out)]
    scenes = [Scene((), None, None) if rng.random() < DROPPED else scene for scene in scenes]
    captions = [describe(scene, rng) for scene in scenes]
    return captions, torch.tensor([labels(scene) for scene in scenes])


def train(tokenizer: CLIPTokenizer) -> Reader:
    """Trains from the saved state where there is one; returns the averaged model."""
    torch.manual_seed(CONFIG.seed)
    reader = Reader(new_text_encoder(len(tokenizer), tokenizer.eos_token_id)).to(device())
    loop = TrainingLoop("text", reader, CONFIG, state_file=STATE_DIR / "text.safetensors")
    captions, targets = caption_set(CAPTIONS, seed=3, held_out=False)
    tokens = tokenize(tokenizer, captions)

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(CAPTIONS, (CONFIG.batch,), generator=generator)
        batch = tokens[rows].to(device())
        complete = batch == tokenizer.eos_token_id  # the end token and the padding, which repeats it
        wanted = targets[rows].to(device())[:, None].expand(-1, TOKENS, -1)
        return attribute_loss(reader(batch)[complete], wanted[complete])

    loop.run(step_loss)
    return loop.averaged_copy()


@torch.no_grad()
def reading_accuracy(reader: Reader, tokenizer: CLIPTokenizer, *, captions: int = 2000) -> float:
    """Share of held-out captions of which every attribute is read right at the last position."""
    texts, targets = caption_set(captions, seed=4, held_out=True)
    read = predictions(reader(tokenize(tokenizer, texts).to(device()))[:, -1]).cpu()
    return round(float((read == targets).all(-1).float().mean()), 4)


def run() -> None:
    """Trains, writes tokenizer and text_encoder, and checks the gate."""
    tokenizer = new_tokenizer()
    reader = train(tokenizer)
    write_part(tokenizer, "tokenizer")
    write_part(half_copy(reader.encoder), "text_encoder")
    reader.encoder = load_text()[1]  # the gate is for what is on disk
    figure = reading_accuracy(reader, tokenizer)
    gate("text", "share of held-out captions read without an error", figure, GATE_ACCURACY)
    record_figures("text", {"captions_read_right": figure})
