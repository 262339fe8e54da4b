"""The measures measure: perfect predictions score 1, exchanged items are caught, known distances come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.attributes import CLASS_COUNTS, agrees, labels, predictions
from training.captions import told
from training.drawing import Item, Scene, sample_scenes
from training.evaluate import attribute_accuracy, frechet_distance
from training.sampling import euler, heun

RED_STAR, BLUE_RING = Item("star", "red", "large"), Item("ring", "blue", "small")


def rows(*scenes: Scene) -> torch.Tensor:
    return torch.tensor([labels(scene) for scene in scenes])


def test_right_predictions_score_one() -> None:
    wanted = rows(*sample_scenes(100, np.random.default_rng(0)))
    assert set(attribute_accuracy(wanted, wanted).values()) == {1.0}


def test_exchanged_items_are_a_wrong_relation() -> None:
    wanted, seen = (
        rows(Scene((RED_STAR, BLUE_RING), "above", "white")),
        rows(Scene((BLUE_RING, RED_STAR), "above", "white")),
    )
    figures = attribute_accuracy(seen, wanted)
    assert (figures["relation"], figures["color"], figures["background"]) == (0.0, 0.0, 1.0)


def test_predictions_pick_the_class_of_each_attribute() -> None:
    wanted = rows(*sample_scenes(20, np.random.default_rng(0)))
    columns = [torch.nn.functional.one_hot(wanted[:, k], count) for k, count in enumerate(CLASS_COUNTS)]
    assert torch.equal(predictions(torch.cat(columns, dim=1)), wanted)


def test_a_scene_agrees_with_all_that_is_told_of_it() -> None:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(300, rng)
    assert agrees(rows(*scenes), rows(*(told(scene, rng) for scene in scenes))).all()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (Scene((RED_STAR,), None, None), False),  # says one item
        (Scene((BLUE_RING, RED_STAR), None, None), True),  # "and"
        (Scene((BLUE_RING, RED_STAR), "above", None), False),
        (Scene((RED_STAR, BLUE_RING), None, "navy"), False),
        (Scene((), None, "white"), True),
        (Scene((), None, None), True),
    ],
)
def test_agreement(caption: Scene, expected: bool) -> None:
    seen = rows(Scene((RED_STAR, BLUE_RING), "above", "white"))
    assert agrees(seen, rows(caption)).item() is expected


def test_frechet_distance_of_known_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5000, 4, generator=generator, dtype=torch.float64)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 0.5) == pytest.approx(4 * 0.25, rel=1e-6)
    # Scaling by 3 moves each deviation by 2: 2^2 per dimension, and the mean by twice itself.
    expected = 4 * features.var(0).sum() + 4 * features.mean(0).square().sum()
    assert frechet_distance(features, 3 * features) == pytest.approx(float(expected), rel=1e-6)


class _Answer:
    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


def test_samplers_are_exact_and_guide() -> None:
    noise, told_rows, empty = torch.zeros(2, 4, 16, 16), torch.full((2, 32, 8), 3.0), torch.ones(1, 32, 8)

    def constant(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> _Answer:
        return _Answer(embeddings.mean((1, 2))[:, None, None, None].expand_as(latents))

    def linear(latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor) -> _Answer:
        return _Answer((timestep / 1000)[:, None, None, None].expand_as(latents))

    guided = euler(constant, noise, told_rows, empty, steps=5, guidance_scale=2.0)  # type: ignore[arg-type]
    torch.testing.assert_close(guided, torch.full_like(noise, -5.0))  # 1 + 2 (3 - 1)
    straight = heun(linear, noise, told_rows, empty, steps=3, guidance_scale=1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(straight, torch.full_like(noise, -0.5))  # the trapezoid is exact on u = sigma
