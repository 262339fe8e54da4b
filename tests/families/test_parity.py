"""Every family against diffusers' own pipeline on the same checkpoint and the same initial noise.

All images of a family, with other steps, guidance and sizes, run in one batch; the reference runs one by one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamflow import families
from streamflow.backends.torch_eager import TorchRunner
from streamflow.families.checkpoint import Checkpoint
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.stages.denoiser import DenoiserStage
from streamflow.types import DecoderKind, DenoiseJob, Tensors
from tests.checkpoints.sd import save_sd_checkpoint, save_sdxl_checkpoint
from tests.checkpoints.text import T5_TOKENS
from tests.checkpoints.transformers import save_flux_checkpoint, save_sd3_checkpoint, save_sit_checkpoint
from tests.families.reference import (
    CPU,
    InstaFlow,
    PeRFlow,
    load_flux,
    load_sd,
    load_sd3,
    load_sdxl,
    relative,
    seeded,
)

FLOAT = partial(TorchRunner, device=CPU, dtype=torch.float32)
PROMPT, NEGATIVE = "a red ring", "blue"
STEPS, SIZES = (1, 4, 5, 28), ((64, 64), (64, 96))


@dataclass(frozen=True)
class Case:
    """One image: how it is asked for; height and width in pixels."""

    steps: int
    guidance: Guidance
    size_px: tuple[int, int]
    seed: int

    def job(self, texts: Mapping[Role, Tensors], sampler: str) -> DenoiseJob:
        return DenoiseJob(texts, self.steps, self.guidance, sampler, self.seed, *self.size_px)

    @property
    def call(self) -> dict[str, Any]:
        """What all pipelines take."""
        height, width = self.size_px
        return {
            "num_inference_steps": self.steps,
            "height": height,
            "width": width,
            "generator": seeded(self.seed),
            "output_type": "latent",
        }


def cases(
    guidances: Sequence[Guidance], *, steps: Sequence[int] = STEPS, sizes: Sequence[tuple[int, int]] = SIZES
) -> list[Case]:
    """All of them with each other; of the longest runs, one for each guidance and size."""
    few, longest = product(steps[:-1], guidances, sizes), zip(cycle(steps[-1:]), guidances, cycle(sizes[::-1]))
    return [Case(*values, seed) for seed, values in enumerate([*few, *longest])]


def check(checkpoint: Checkpoint, every: Sequence[Case], reference: Callable[[Case], torch.Tensor]) -> None:
    """The latents of each case to 1e-4, and the pictures of the first ones to one of 255 levels."""
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=8)
    texts = encoded(checkpoint, PROMPT, NEGATIVE)
    final = stage.run([case.job(texts, stage.card.default_sampler) for case in every])
    for case, latents in zip(every, final, strict=True):
        assert relative(latents, reference(case).numpy()) < 1e-4, case
    check_pixels(checkpoint, final[:2])


def encoded(checkpoint: Checkpoint, *texts: str) -> dict[Role, Tensors]:
    encoder = families.load_text_encoder(checkpoint, FLOAT)
    return dict(zip((Role.TARGET, Role.NEGATIVE), encoder.encode(texts), strict=True))


def check_pixels(checkpoint: Checkpoint, final: Sequence[np.ndarray]) -> None:
    """As the pipelines decode and round."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKL.from_pretrained(checkpoint.folder / "vae")
    decoder = families.load_decoder(checkpoint, DecoderKind.FULL, FLOAT)
    for latents in final:
        plain = torch.from_numpy(latents)[None] / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        with torch.inference_mode():
            images = vae.decode(plain, return_dict=False)[0]
        expected = np.asarray(VaeImageProcessor().postprocess(images)[0])
        ours = decoder.decode(latents[None])[0]
        assert ours.shape == expected.shape
        assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_sd_checkpoint(tmp_path_factory.mktemp("sd") / "diffusion", diffusion=True)


def test_perflow(diffusion: Path) -> None:
    pipeline = load_sd(diffusion, PeRFlow())

    def reference(case: Case) -> torch.Tensor:
        scale = case.guidance.scale
        return pipeline(PROMPT, negative_prompt=NEGATIVE, guidance_scale=scale, **case.call).images[0]

    checkpoint = Checkpoint(diffusion, flow="perflow")
    assert families.describe(checkpoint).default_sampler == "perflow"
    check(checkpoint, cases([Guidance(1.0), Guidance(7.5)], steps=(4, 5, 28)), reference)


def test_perflow_that_predicts_the_velocity(diffusion: Path, tmp_path: Path) -> None:
    """As for SD 2.1, with PeRFlow's own scheduler in the folder."""
    folder = shutil.copytree(diffusion, tmp_path / "velocity")
    config = {"_class_name": "PeRFlowScheduler", "prediction_type": "velocity"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    pipeline = load_sd(folder, PeRFlow(prediction="velocity"))

    def reference(case: Case) -> torch.Tensor:
        scale = case.guidance.scale
        return pipeline(PROMPT, negative_prompt=NEGATIVE, guidance_scale=scale, **case.call).images[0]

    card = families.describe(folder)
    assert (card.default_sampler, card.default_steps, card.default_guidance_scale) == ("perflow", 8, 7.5)
    check(Checkpoint(folder), cases([Guidance(1.0), Guidance(7.5)], steps=(4, 5, 8)), reference)


def test_instaflow_and_two_rectified_flow(diffusion: Path) -> None:
    """They differ in how they are used only."""
    pipeline = load_sd(diffusion, InstaFlow())

    def reference(case: Case) -> torch.Tensor:
        scale = case.guidance.scale
        return pipeline(PROMPT, negative_prompt=NEGATIVE, guidance_scale=scale, **case.call).images[0]

    cards = [families.describe(Checkpoint(diffusion, flow=flow)) for flow in ("instaflow", "2rf")]
    assert [(card.default_steps, card.default_guidance_scale) for card in cards] == [(1, 1.0), (25, 1.5)]
    assert cards[0].flow == cards[1].flow
    check(Checkpoint(diffusion, flow="2rf"), cases([Guidance(1.0), Guidance(1.5)]), reference)


def test_sdxl(tmp_path: Path) -> None:
    folder = save_sdxl_checkpoint(tmp_path / "sdxl")
    pipeline = load_sdxl(folder, PeRFlow(prediction="ddim_eps"))

    def reference(case: Case) -> torch.Tensor:
        scale = case.guidance.scale
        return pipeline(PROMPT, negative_prompt=NEGATIVE, guidance_scale=scale, **case.call).images[0]

    checkpoint = Checkpoint(folder, flow="perflow")
    card = families.describe(checkpoint)
    assert (card.default_steps, card.default_guidance_scale) == (6, 2.0)
    check(checkpoint, cases([Guidance(1.0), Guidance(2.0)], steps=(4, 5, 28)), reference)


def test_sdxl_without_a_negative_prompt_is_guided_away_from_zeros(tmp_path: Path) -> None:
    folder = save_sdxl_checkpoint(tmp_path / "sdxl")
    checkpoint = Checkpoint(folder, flow="perflow")
    (case,) = cases([Guidance(2.0)], steps=[4], sizes=[(64, 64)])
    expected = load_sdxl(folder, PeRFlow(prediction="ddim_eps"))(PROMPT, guidance_scale=2.0, **case.call).images[0]
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=1)
    assert relative(stage.run([case.job(encoded(checkpoint, PROMPT, ""), "perflow")])[0], expected.numpy()) < 1e-4


@pytest.mark.parametrize("t5", [True, False])
def test_sd3(tmp_path: Path, t5: bool) -> None:
    folder = save_sd3_checkpoint(tmp_path / "sd3", t5=t5)
    pipeline = load_sd3(folder)

    def reference(case: Case) -> torch.Tensor:
        return pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            guidance_scale=case.guidance.scale,
            max_sequence_length=T5_TOKENS,
            **case.call,
        ).images[0]

    check(Checkpoint(folder), cases([Guidance(1.0), Guidance(5.0)]), reference)


@pytest.mark.parametrize("dev", [True, False])
def test_flux(tmp_path: Path, dev: bool) -> None:
    """Guidance as an input of the network, and with a negative prompt in a second row."""
    folder = save_flux_checkpoint(tmp_path / "flux", distilled_guidance=dev)
    pipeline = load_flux(folder)

    def reference(case: Case) -> torch.Tensor:
        height, width = case.size_px
        packed = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE if case.guidance.on else None,
            true_cfg_scale=case.guidance.scale,
            guidance_scale=case.guidance.embedded,
            max_sequence_length=T5_TOKENS,
            **case.call,
        ).images
        unpacked: torch.Tensor = pipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor)[0]
        return unpacked

    guidances = [Guidance(1.0, embedded=3.5), Guidance(1.0, embedded=1.0), Guidance(3.0, embedded=2.0)]
    check(Checkpoint(folder), cases(guidances), reference)


def test_sit(tmp_path: Path) -> None:
    """Against a plain loop over its transformer: guided channels 0 to 2, the conditional ones of the rest."""
    from diffusers import DiTTransformer2DModel

    folder = save_sit_checkpoint(tmp_path / "sit")
    network = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    label, none = 7, 10

    @torch.inference_mode()
    def reference(case: Case) -> torch.Tensor:
        x = torch.randn(4, 16, 16, generator=seeded(case.seed))[None]
        for k in range(case.steps):
            both = network(
                torch.cat([x, x]), torch.full((2,), k / case.steps), class_labels=torch.tensor([label, none])
            ).sample[:, :4]
            velocity = both[:1].clone()
            if case.guidance.on:
                velocity[:, :3] = both[1:, :3] + case.guidance.scale * (both[:1, :3] - both[1:, :3])
            x = x + velocity / case.steps
        return x[0]

    checkpoint = Checkpoint(folder)
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=8)
    texts = encoded(checkpoint, str(label), "")
    every = cases([Guidance(1.0), Guidance(4.0)], sizes=[(64, 64)])
    final = stage.run([case.job(texts, "euler") for case in every])
    for case, latents in zip(every, final, strict=True):
        assert relative(latents, reference(case).numpy()) < 1e-4, case
    check_pixels(checkpoint, final[:1])


def test_the_refiner_of_sit_goes_by_the_velocity_of_its_base_network(tmp_path: Path) -> None:
    """FlowTurbo's H1R2 as its authors write it, in their sign and with time rising; guided velocity on both rows."""
    from diffusers import DiTTransformer2DModel

    folder = save_sit_checkpoint(tmp_path / "sit")
    networks = {}
    for name in ("transformer", "transformer_refiner"):
        networks[name] = DiTTransformer2DModel.from_pretrained(folder / name).eval()
        for block in networks[name].transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    labels, scale = torch.tensor([7, 10]), 2.0

    def guided(name: str, x: torch.Tensor, t: float) -> torch.Tensor:
        both = networks[name](torch.cat([x, x]), torch.full((2,), t), class_labels=labels).sample[:, :4]
        out = both[:1].clone()
        out[:, :3] = both[1:, :3] + scale * (both[:1, :3] - both[1:, :3])
        return out

    def refined(x: torch.Tensor, velocity: torch.Tensor, t: float) -> torch.Tensor:
        return velocity + guided("transformer_refiner", torch.cat([x, velocity], dim=1), t)

    x, h = torch.randn(4, 16, 16, generator=seeded(3))[None], 1 / 3
    with torch.inference_mode():
        first = guided("transformer", x, 0.0)
        second = guided("transformer", x + h * first, h)
        x, cache = x + h / 2 * (first + second), second
        for k in (1, 2):
            begin = refined(x, cache, k * h)
            end = refined(x + h * begin, begin, (k + 1) * h)
            x, cache = x + h / 2 * (begin + end), begin
    checkpoint = Checkpoint(folder)
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=2)
    job = DenoiseJob(encoded(checkpoint, "7", ""), 3, Guidance(scale), "H1R2", 3, 64, 64)
    assert relative(stage.run([job])[0], x[0].numpy()) < 1e-4
