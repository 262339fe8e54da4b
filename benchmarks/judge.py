"""What the classifier of the built-in model sees in pictures, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.attributes import labels, predictions
from training.captions import describe
from training.classifier import labelled_drawings, load_classifier
from training.drawing import sample_scenes
from training.evaluate import attribute_accuracy, frechet_distance

RESAMPLES = 300
_SCENE_SEED = 21


@dataclass(frozen=True)
class Captions:
    """Held-out captions, and the labels [N, 8] of their scenes."""

    prompts: list[str]
    wanted: Tensor


def make_captions(count: int) -> Captions:
    scenes = sample_scenes(count, np.random.default_rng(_SCENE_SEED), held_out=True)
    rng = np.random.default_rng(_SCENE_SEED)
    return Captions([describe(scene, rng) for scene in scenes], torch.tensor([labels(scene) for scene in scenes]))


class Judge:
    """Measures pictures of captions. Args: wanted: labels of the captions' scenes, [N, 8]."""

    def __init__(self, wanted: Tensor) -> None:
        self._wanted, self._classifier = wanted, load_classifier()
        rng = np.random.default_rng(_SCENE_SEED + 1)
        real = [self._see(labelled_drawings(64, rng, held_out=True)[0])[0] for _ in range(0, len(wanted), 64)]
        self._real = torch.cat(real)[: len(wanted)]

    def figures(self, pictures: Iterable[Tensor]) -> dict[str, Any]:
        """Attribute accuracy and Fréchet distance, each with the ends of its 95 % interval.

        Args:
            pictures: of all captions in their order, in any parts, float32 [n, 3, H, W] in -1..1.
        """
        features, attributes = (torch.cat(parts) for parts in zip(*map(self._see, pictures), strict=True))
        count = len(self._wanted)
        return {
            "accuracy": interval(
                lambda rows: attribute_accuracy(attributes[rows], self._wanted[rows])["accuracy"], count
            ),
            "frechet": _centered(interval(lambda rows: frechet_distance(features[rows], self._real), count)),
        }

    @torch.no_grad()
    def _see(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self._classifier(pictures)
        return features, predictions(logits)


def interval(figure: Callable[[Tensor], float], count: int) -> list[float]:
    """The figure over `count` images, and its 2.5 and 97.5 percentiles over resamples of them."""
    generator = torch.Generator().manual_seed(0)
    resampled = [figure(torch.randint(count, (count,), generator=generator)) for _ in range(RESAMPLES)]
    values = [figure(torch.arange(count)), *np.percentile(resampled, [2.5, 97.5])]
    return [round(float(value), 5) for value in values]


def _centered(values: list[float]) -> list[float]:
    """The same width around the figure: images that are drawn twice raise the distance by themselves."""
    value, low, high = values
    return [value, round(value - (high - low) / 2, 5), round(value + (high - low) / 2, 5)]
