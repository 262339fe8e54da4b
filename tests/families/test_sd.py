"""The SD family against diffusers' own pipeline on the same checkpoint, as the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from streamflow import families
from streamflow.backends.torch_eager import TorchRunner
from streamflow.errors import InvalidRequestError
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.flow.spec import RefinerSpec
from streamflow.stages.denoiser import DenoiserStage
from streamflow.types import DecoderKind, DenoiseJob
from tests.checkpoints import TOKENS
from tests.families.reference import CPU, load_sd, relative

FLOAT = partial(TorchRunner, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(sd_checkpoint: Path) -> StableDiffusionPipeline:
    return load_sd(sd_checkpoint)


@pytest.mark.parametrize("checkpoint", ["sd_checkpoint", "shapes"])
def test_latents_equal_the_reference_for_all_steps_and_guidance_in_one_batch(
    checkpoint: str, request: pytest.FixtureRequest
) -> None:
    """The whole mix runs in one batch; the reference runs one by one."""
    folder = request.getfixturevalue(checkpoint)
    stage, reference = DenoiserStage.load(folder, device="cpu", slots=8), load_sd(folder)
    prompt, negative_prompt = "a red circle", "a blue ring"
    encoder = families.load_text_encoder(folder, FLOAT)
    texts = dict(zip((Role.TARGET, Role.NEGATIVE), encoder.encode([prompt, negative_prompt]), strict=True))
    size = stage.card.default_height
    cases = [(steps, guidance) for steps in (1, 2, 4, 7, 25) for guidance in (1.0, 4.0)]
    jobs = [
        DenoiseJob(texts, steps, Guidance(guidance), "euler", 10 + k, size, size)
        for k, (steps, guidance) in enumerate(cases)
    ]
    for k, ((steps, guidance), latents) in enumerate(zip(cases, stage.run(jobs), strict=True)):
        expected = reference(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            sigmas=[1 - i / steps for i in range(steps)],
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(10 + k),
            height=size,
            width=size,
            output_type="latent",
        ).images[0]
        assert relative(latents, expected.numpy()) < 1e-4, (steps, guidance)


def test_pixels_equal_the_reference(sd_checkpoint: Path, reference: StableDiffusionPipeline) -> None:
    latents = torch.randn(2, 4, 16, 16)
    ours = families.load_decoder(sd_checkpoint, DecoderKind.FULL, FLOAT).decode(latents.numpy())
    decoded = reference.vae.decode(latents / reference.vae.config.scaling_factor, return_dict=False)[0].detach()
    theirs = (reference.image_processor.postprocess(decoded, output_type="np") * 255).round().astype(np.uint8)
    assert ours.shape == (2, 64, 64, 3)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_tiny_decoder_takes_the_same_latents(sd_checkpoint: Path) -> None:
    pixels = families.load_decoder(sd_checkpoint, DecoderKind.TINY, FLOAT).decode(np.zeros((3, 4, 16, 12), np.float32))
    assert pixels.shape == (3, 64, 48, 3)
    assert pixels.dtype == np.uint8


def test_vae_encoder_gives_the_scaled_mode(sd_checkpoint: Path, reference: StableDiffusionPipeline) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
    latents = families.load_vae_encoder(sd_checkpoint, FLOAT).encode(images)
    with torch.inference_mode():
        expected = reference.vae.encode(torch.from_numpy(images)).latent_dist.mode() * 0.7
    assert relative(latents, expected.numpy()) < 1e-5


def test_conditioning_equals_the_reference_and_cuts_are_told(
    sd_checkpoint: Path, reference: StableDiffusionPipeline
) -> None:
    encoder = families.load_text_encoder(sd_checkpoint, FLOAT)
    for prompt in ("a b", "far too long for twelve tokens", ""):
        (ours,) = encoder.encode([prompt])
        theirs = reference.encode_prompt(prompt, CPU, 1, do_classifier_free_guidance=False)[0][0]
        torch.testing.assert_close(torch.from_numpy(ours["prompt_embeds"]), theirs, rtol=1e-5, atol=1e-6)
    assert encoder.max_tokens == TOKENS
    assert encoder.truncated("abcdefghij") == ""
    assert encoder.truncated("abcdefghijk").replace(" ", "") == "k"


def test_card_is_read_from_the_configs(sd_checkpoint: Path) -> None:
    card = families.describe(sd_checkpoint, "toy")
    assert (card.name, card.family, card.default_width, card.latent_factor, card.max_prompt_tokens) == (
        "toy",
        "sd",
        64,
        4,
        TOKENS,
    )
    assert card.revision == families.describe(sd_checkpoint).revision


def test_revision_follows_the_weights(sd_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd_checkpoint, tmp_path / "copy")
    assert families.describe(copy).revision == families.describe(sd_checkpoint).revision
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert families.describe(copy).revision != families.describe(sd_checkpoint).revision


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_part_is_named(sd_checkpoint: Path, tmp_path: Path, part: str) -> None:
    copy = shutil.copytree(sd_checkpoint, tmp_path / "copy")
    (copy / part).unlink()
    with pytest.raises(InvalidRequestError, match=part):
        families.describe(copy)


def test_checkpoint_that_is_no_rectified_flow_is_refused(sd_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd_checkpoint, tmp_path / "copy")
    _edit(copy / "scheduler" / "scheduler_config.json", {"_class_name": "PNDMScheduler"})
    with pytest.raises(InvalidRequestError, match="PNDMScheduler"):
        families.describe(copy)
    _edit(copy / "model_index.json", {"_class_name": "KolorsPipeline"})
    with pytest.raises(InvalidRequestError, match="KolorsPipeline"):
        families.describe(copy)


def test_a_refiner_is_loaded_where_the_checkpoint_has_one(sd_checkpoint: Path, tmp_path: Path) -> None:
    card = families.describe(sd_checkpoint)
    assert card.flow.refiner == RefinerSpec(max_step=0.25)
    assert set(families.load_denoiser(sd_checkpoint, FLOAT).networks) == {"base", "refiner"}
    without = shutil.copytree(sd_checkpoint, tmp_path / "without")
    shutil.rmtree(without / "unet_refiner")
    assert families.describe(without).flow.refiner is None
    assert families.describe(without).revision != card.revision
    assert set(families.load_denoiser(without, FLOAT).networks) == {"base"}
    with pytest.raises(InvalidRequestError, match="a checkpoint with a refiner"):
        DenoiserStage.load(without, device="cpu").run(
            [DenoiseJob({}, 2, Guidance(), "H1R1", 0, card.default_height, card.default_width)]
        )
    wrong = shutil.copytree(sd_checkpoint, tmp_path / "wrong")
    _edit(wrong / "unet_refiner" / "config.json", {"in_channels": 4})
    with pytest.raises(InvalidRequestError, match="8 and 4: the latents and the last velocity in"):
        families.describe(wrong)


def test_row_count_pads_the_network_calls(sd_checkpoint: Path) -> None:
    """In deterministic mode an image has the same bytes alone and among strangers."""
    stage = DenoiserStage.load(sd_checkpoint, device="cpu", slots=8, deterministic=True)
    rng = np.random.default_rng(0)

    def job(k: int) -> DenoiseJob:
        texts = {role: {"prompt_embeds": rng.normal(size=(TOKENS, 16)).astype(np.float32)} for role in Role}
        return DenoiseJob(texts, 2 + k, Guidance((1.0, 4.0)[k % 2]), "euler", k, 64, 64)

    jobs = [job(k) for k in range(7)]
    together = stage.run(jobs)
    for one, latents in zip(jobs, together, strict=True):
        assert np.array_equal(stage.run([one])[0], latents)


def _edit(path: Path, change: Mapping[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_network_runs_each_row_at_its_own_timestep(sd_checkpoint: Path) -> None:
    denoiser = families.load_denoiser(sd_checkpoint, FLOAT)
    latents, embeds = torch.randn(3, 4, 16, 16), torch.randn(3, TOKENS, 16)
    timestep = torch.tensor([1000.0, 333.3, 0.5])
    together = denoiser.networks["base"](latents, timestep, {"prompt_embeds": embeds})
    for k in range(3):
        one: Tensor = denoiser.networks["base"](latents[[k]], timestep[[k]], {"prompt_embeds": embeds[[k]]})
        torch.testing.assert_close(together[[k]], one, rtol=1e-4, atol=1e-5)
