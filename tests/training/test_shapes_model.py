"""models/shapes is what diffusers expects, and small."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from training.classifier import ShapesClassifier
from training.networks import LATENT_PX, TEXT_WIDTH, TOKENS
from training.parts import MODEL_DIR

MAX_BYTES = 30_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODEL_DIR, dtype=torch.float32)


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*") if path.is_file()) <= MAX_BYTES


def test_the_pipeline_embeds_as_training_does(pipeline: StableDiffusionPipeline) -> None:
    told, empty = pipeline.encode_prompt("a red circle", torch.device("cpu"), 1, True)
    assert told.shape == empty.shape == (1, TOKENS, TEXT_WIDTH)
    assert not torch.allclose(told, empty)
    assert pipeline.tokenizer.model_max_length == TOKENS


@torch.no_grad()
def test_a_step_and_both_decoders_run(pipeline: StableDiffusionPipeline) -> None:
    latents = torch.randn(1, 4, LATENT_PX, LATENT_PX, generator=torch.Generator().manual_seed(0))
    told, _ = pipeline.encode_prompt("a red circle", torch.device("cpu"), 1, False)
    velocity = pipeline.unet(latents, torch.tensor([1000.0]), told).sample
    assert velocity.shape == latents.shape
    tiny = AutoencoderTiny.from_pretrained(MODEL_DIR / "tiny_vae", dtype=torch.float32)
    for decoded in (pipeline.vae.decode(latents).sample, tiny.decode(latents).sample):
        assert decoded.shape == (1, 3, 128, 128)
        assert decoded.isfinite().all()


def test_the_unets_have_one_architecture() -> None:
    first, second = (json.loads((MODEL_DIR / name / "config.json").read_text()) for name in ("unet", "unet_base"))
    assert first == second


def test_no_config_tells_of_the_machine_that_it_was_made_on() -> None:
    for path in MODEL_DIR.rglob("*.json"):
        assert "_name_or_path" not in path.read_text("utf-8"), path


def test_the_classifier_reads_every_attribute() -> None:
    features, logits = ShapesClassifier()(torch.zeros(2, 3, 128, 128))
    assert features.shape == (2, 128)
    assert logits.shape == (2, 51)
