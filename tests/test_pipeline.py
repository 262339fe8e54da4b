"""The fused form, against diffusers' pipeline and against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from streamflow.errors import InvalidRequestError
from streamflow.pipeline import Pipeline

PICTURE = Image.new("RGB", (64, 64))


@pytest.fixture(scope="module")
def pipeline(sd_checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(sd_checkpoint, device="cpu", decoder="full", slots=4, deterministic=True)


def test_images_equal_the_reference_pipeline(sd_checkpoint: Path, pipeline: Pipeline) -> None:
    from tests.families.reference import load_sd

    theirs = load_sd(sd_checkpoint)(
        "a b",
        num_inference_steps=4,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=3.0,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="np",
    ).images
    ours = pipeline("a b", steps=4, guidance_scale=3.0, seed=5, num_images=2, output="np")
    assert ours.seeds == [5, 6]
    assert np.abs(ours.images - (theirs * 255).round()).max() <= 1


def test_an_image_of_a_call_is_made_again_alone_by_its_seed(pipeline: Pipeline) -> None:
    together = pipeline(["a", "b"], num_images=3, seed=2**64 - 2, steps=2, guidance_scale=2.0, output="np")
    assert together.seeds == [2**64 - 2, 2**64 - 1, 0, 1, 2, 3]
    alone = pipeline("b", seed=2, steps=2, guidance_scale=2.0, output="np")
    assert np.array_equal(together.images[4], alone.images[0])


def test_the_initial_noise_may_be_given(pipeline: Pipeline) -> None:
    noise = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(3)).numpy()[None]
    given = pipeline("a", latents=noise, seed=99, output="latents")
    assert np.array_equal(given.latents, pipeline("a", seed=3, output="latents").latents)
    assert given.images == []
    with pytest.raises(InvalidRequestError, match="one per image"):
        pipeline("a", latents=noise, num_images=2)


def test_image_to_image_and_mask(pipeline: Pipeline) -> None:
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    base = pipeline("a", image=source, strength=1.0, steps=4, seed=1).latents
    assert base.shape == (1, 4, 16, 16)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    repainted = pipeline("a", image=source, strength=1.0, mask=mask, steps=4, seed=1)
    kept = repainted.latents
    # To the pixel: what is not repainted does not go through the autoencoder.
    assert np.array_equal(np.asarray(repainted.images[0])[32:], np.asarray(source)[32:])
    untouched = pipeline("b c", image=source, strength=1.0, mask=mask, steps=4, seed=2).latents
    assert np.array_equal(kept[:, :, 8:], untouched[:, :, 8:])
    assert not np.array_equal(kept[:, :, :8], untouched[:, :, :8])


def test_defaults_timings_and_random_seeds(pipeline: Pipeline) -> None:
    first, second = pipeline("a"), pipeline("a")
    assert first.seeds != second.seeds
    assert list(first.timings) == ["encode", "denoise", "decode"]
    assert first.images[0].size == (64, 64)


def test_an_interval_may_be_left_out(pipeline: Pipeline) -> None:
    options = {"seed": 1, "guidance_scale": 3.0, "steps": 2, "output": "latents"}
    whole = pipeline("a", guidance_interval=(1.0, 0.0), **options).latents  # type: ignore[arg-type]
    assert np.array_equal(pipeline("a", guidance_interval=None, **options).latents, whole)  # type: ignore[arg-type]


def test_not_square(pipeline: Pipeline) -> None:
    assert pipeline("a", width=96, height=40, steps=1).images[0].size == (96, 40)


def test_a_prompt_that_is_too_long_warns(pipeline: Pipeline) -> None:
    assert "left out" in pipeline("a prompt that does not fit", steps=1).warnings[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0; allowed: 1 to 100"),
        ({"steps": 10_000}, "steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"width": 63}, "width: got 63; allowed: multiples of 4"),
        ({"height": 2**31}, "height"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"num_images": 0}, "num_images"),
        ({"prompt": " "}, "prompt: got ' '"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a\0b"}, "control characters"),
        ({"sampler": "magic"}, "sampler: got 'magic'; allowed: one of euler"),
        ({"strength": 0.5}, "strength"),
        ({"guidance_interval": 0.5}, "guidance_interval: got 0.5; allowed: two sigmas"),
        ({"guidance_interval": (1.0, 0.5, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.2, 0.9)}, "guidance_interval"),
        ({"source_prompt": "a\0b", "image": PICTURE, "sampler": "flowedit"}, "source_prompt: .* control characters"),
    ],
)
def test_wrong_values_are_named(pipeline: Pipeline, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        pipeline(**({"prompt": "a"} | changes))  # type: ignore[arg-type]


def test_decoder_that_does_not_exist(sd_checkpoint: Path) -> None:
    with pytest.raises(InvalidRequestError, match="decoder: got 'huge'; allowed: tiny, full"):
        Pipeline.from_pretrained(sd_checkpoint, decoder="huge")  # type: ignore[arg-type]
