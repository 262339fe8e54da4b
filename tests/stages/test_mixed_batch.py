"""Any sampler beside any other in one batch, on real networks: every slot gets the latents that it gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamflow.flow.guidance import Guidance, GuidanceMode
from streamflow.flow.programs import Role
from streamflow.stages.denoiser import DenoiserStage
from streamflow.types import DenoiseJob


def mix(stage: DenoiserStage) -> dict[str, DenoiseJob]:
    """One job for each way of sampling; those with `source` start from an image."""
    rng = np.random.default_rng(0)
    height, width = stage.card.default_height, stage.card.default_width
    shape = stage._denoiser.latent_shape(height, width)
    source = rng.standard_normal(shape, np.float32)
    mask = np.zeros(shape[1:], np.float32)
    mask[: shape[1] // 2] = 1

    def job(sampler: str, steps: int, guidance: Guidance, **more: object) -> DenoiseJob:
        names = stage._denoiser.conditioning_shapes.items()
        texts = {role: {name: rng.standard_normal(size, np.float32) for name, size in names} for role in Role}
        seed = int(rng.integers(2**32))
        return DenoiseJob(texts, steps, guidance, sampler, seed, height, width, **more)  # type: ignore[arg-type]

    plain, guided = Guidance(), Guidance(3.0)
    interval = Guidance(3.0, start_sigma=0.8, end_sigma=0.3)
    return {
        "Euler": job("euler", 5, guided),
        "Euler, one step": job("euler", 1, plain),
        "Heun": job("heun", 4, plain),
        "midpoint": job("midpoint", 3, guided),
        "FireFlow": job("fireflow", 5, interval),
        "pseudo corrector": job("pseudo", 6, guided),
        "FlowTurbo": job("H1P5R3", 9, plain),
        "FlowTurbo, guided": job("H2P4R2", 8, guided),
        "PeRFlow": job("perflow[windows=3]", 7, plain),
        "InstaFlow": job("instaflow", 2, plain),
        "stochastic": job("euler-sde[eta=0.5]", 5, guided),
        "guidance interval": job("euler", 6, interval),
        "self-negative": job("euler", 4, Guidance(2.0, mode=GuidanceMode.SELF_NEGATIVE, residual=0.5)),
        "onetime-negative": job("euler", 4, Guidance(2.0, mode=GuidanceMode.ONETIME_NEGATIVE)),
        "image to image": job("H1P3R1", 5, guided, init_latents=source, strength=0.6),
        "inpainting": job("pseudo", 5, guided, init_latents=source, strength=1.0, mask=mask),
        "FlowEdit": job("flowedit[source_guidance=1.5]", 6, guided, init_latents=source, strength=0.7),
    }


@pytest.mark.parametrize("checkpoint", ["sd_checkpoint", "shapes"])
def test_every_way_of_sampling_beside_every_other(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(checkpoint)
    stage = DenoiserStage.load(folder, device="cpu", slots=32)
    jobs = mix(stage)
    together = stage.run(list(jobs.values()))
    for (name, job), latents in zip(jobs.items(), together, strict=True):
        (alone,) = stage.run([job])
        assert np.abs(latents - alone).max() < 1e-4 * max(1.0, np.abs(alone).max()), name


def test_in_deterministic_mode_the_bits_are_the_same(sd_checkpoint: Path) -> None:
    stage = DenoiserStage.load(sd_checkpoint, device="cpu", slots=32, deterministic=True)
    jobs = mix(stage)
    for (name, job), latents in zip(jobs.items(), stage.run(list(jobs.values())), strict=True):
        assert np.array_equal(stage.run([job])[0], latents), name
