"""The fused pipeline with what only some families take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamflow.errors import InvalidRequestError
from streamflow.pipeline import Pipeline
from tests.checkpoints.text import T5_TOKENS
from tests.checkpoints.transformers import save_flux_checkpoint, save_sit_checkpoint
from tests.families.reference import load_flux, seeded


def test_guidance_that_is_fed_to_the_network_and_guidance_with_a_negative_prompt(tmp_path: Path) -> None:
    folder = save_flux_checkpoint(tmp_path / "flux")
    reference, pipeline = load_flux(folder), Pipeline.from_pretrained(folder, device="cpu", decoder="full")
    for negative, true_scale in (("", None), ("blue", 3.0)):
        ours = pipeline(
            "a red ring",
            negative_prompt=negative,
            true_cfg_scale=true_scale,
            guidance_scale=2.5,
            steps=4,
            seed=1,
            output="np",
        )
        theirs = reference(
            "a red ring",
            negative_prompt=negative or None,
            true_cfg_scale=true_scale or 1.0,
            guidance_scale=2.5,
            num_inference_steps=4,
            height=64,
            width=64,
            max_sequence_length=T5_TOKENS,
            generator=seeded(1),
        ).images[0]
        assert np.abs(ours.images[0].astype(int) - np.asarray(theirs, dtype=int)).max() <= 1
    with pytest.raises(InvalidRequestError, match=r"true_cfg_scale: got 3.0; allowed: more than 1 only with a negati"):
        pipeline("a red ring", true_cfg_scale=3.0)
    with pytest.raises(InvalidRequestError, match=r"negative_prompt: got 'blue'; allowed: none, or one with true_cfg"):
        pipeline("a red ring", negative_prompt="blue")


def test_labels_in_place_of_prompts(tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(save_sit_checkpoint(tmp_path / "sit"), device="cpu")
    both = pipeline(class_labels=[7, 2], steps=2, seed=3, output="np").images
    assert both.shape == (2, 64, 64, 3)
    alone = pipeline(class_labels=[2], steps=2, seed=4, output="np").images[0]
    assert np.abs(both[1].astype(int) - alone.astype(int)).max() <= 1
    for wrong, message in (
        ({"class_labels": [10]}, "class_labels: got 10; allowed: 0 to 9"),
        ({"prompt": "a cat"}, "prompts: got '1'; allowed: none; sit takes class_labels, 0 to 9"),
        ({"class_labels": [1], "negative_prompt": "a dog"}, "negative_prompt: got 'a dog'; allowed: none"),
        ({}, "prompts: got '0'; allowed: none; sit takes class_labels"),
        ({"class_labels": [1], "width": 96}, "width: got 96; allowed: multiples of 64 from 64 to 64"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            pipeline(**wrong)  # type: ignore[arg-type]
