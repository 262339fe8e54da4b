"""Phase `classifier`: a small network that sees a drawing's attributes, to measure what the model draws."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.attributes import CLASS_COUNTS, attribute_loss, labels, predictions
from training.drawing import draw, lay_out, sample_scenes
from training.figures import gate, record_figures
from training.loop import LoopConfig, TrainingLoop
from training.parts import MODEL_DIR, STATE_DIR, device

FEATURES = 128
GATE_ACCURACY = 0.99
CONFIG = LoopConfig(steps=900, batch=64, learning_rate=2e-3, ema_decay=0.99)


class ShapesClassifier(nn.Module):
    """Images [B, 3, 128, 128] in -1..1 to features [B, 128] and attribute logits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 32)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 8 * 8, FEATURES), nn.SiLU())
        self.heads = nn.Linear(FEATURES, sum(CLASS_COUNTS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return features, self.heads(features)


def labelled_drawings(count: int, rng: np.random.Generator, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """Drawings [B, 3, 128, 128] and the labels [B, 8] of their complete scenes."""
    scenes = sample_scenes(count, rng, held_out=held_out)
    drawings = draw(lay_out(scenes, rng)).to(device())
    return drawings, torch.tensor([labels(scene) for scene in scenes], device=device())


def _worn(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Drawings with noise and blur of random strength, as a decoder leaves them."""
    strength = torch.rand(len(drawings), 1, 1, 1, generator=generator).to(drawings)
    blurred = nn.functional.avg_pool2d(drawings, 5, stride=1, padding=2, count_include_pad=False)
    mixed = drawings + torch.rand(len(drawings), 1, 1, 1, generator=generator).to(drawings) * (blurred - drawings)
    return mixed + 0.1 * strength * torch.randn(drawings.shape, generator=generator).to(drawings)


def train() -> ShapesClassifier:
    """Trains from the saved state where there is one; returns the average."""
    torch.manual_seed(CONFIG.seed)
    model = ShapesClassifier().to(device())
    loop = TrainingLoop("classifier", model, CONFIG, state_file=STATE_DIR / "classifier.safetensors")

    def step_loss(step: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng((7, step))
        drawings, targets = labelled_drawings(CONFIG.batch, rng, held_out=False)
        return attribute_loss(model(_worn(drawings, generator))[1], targets)

    loop.run(step_loss)
    return loop.averaged_copy()


def load_classifier() -> ShapesClassifier:
    """The finished classifier of models/shapes."""
    model = ShapesClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(_path()).items()})
    return model.to(device()).eval().requires_grad_(False)


@torch.no_grad()
def drawing_accuracy(model: ShapesClassifier, *, images: int = 2048) -> float:
    """Share of attributes of held-out drawings that are seen right."""
    rng = np.random.default_rng(8)
    hits = []
    for _ in range(images // 64):
        drawings, targets = labelled_drawings(64, rng, held_out=True)
        hits.append((predictions(model(drawings)[1]) == targets).float().mean())
    return round(float(torch.stack(hits).mean()), 4)


def run() -> None:
    """Trains, writes models/shapes/classifier and checks the gate."""
    model = train()
    _path().parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().cpu() for name, value in model.state_dict().items()}, _path().with_suffix(".tmp"))
    os.replace(_path().with_suffix(".tmp"), _path())
    figure = drawing_accuracy(load_classifier())
    gate("classifier", "attribute accuracy on drawings", figure, GATE_ACCURACY)
    record_figures("classifier", {"accuracy_on_drawings": figure})


def _path() -> Path:
    return MODEL_DIR / "classifier" / "model.safetensors"
