"""One request gives one picture, whatever the topology and the neighbours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.pipeline import Pipeline
from streamflow.stages.denoiser import DenoiserStage
from streamflow.types import DenoiseJob
from tests.e2e.conftest import Wish, counters, wishes

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]


async def test_fused_local_alone_and_among_strangers_give_the_same_bytes(client: AsyncClient, fused: Pipeline) -> None:
    mine = Wish("a large red circle at the left on a white background", {"steps": 4, "guidance_scale": 2.0, "seed": 7})
    strangers = wishes(7)
    alone = await mine.ask(client)
    together, *_ = await asyncio.gather(*(wish.ask(client) for wish in [mine, *strangers]))
    assert alone == together == mine.fuse(fused)


async def test_image_to_image_with_a_mask_is_the_same_too(client: AsyncClient, fused: Pipeline) -> None:
    from PIL import Image

    source = fused("a blue square on a white background", seed=1).images[0]
    mask = Image.new("L", source.size)
    mask.paste(255, (0, 0, source.width // 2, source.height))
    wish = Wish("a red circle", {"steps": 8, "seed": 3, "image": source, "strength": 0.75, "mask": mask})
    assert await wish.ask(client) == wish.fuse(fused)


async def test_every_sampler_is_the_same_too_and_all_share_one_batch(client: AsyncClient, fused: Pipeline) -> None:
    source = fused("a large red circle on a white background", seed=1).images[0]
    edited = {"image": source, "strength": 0.75}
    options: list[dict[str, Any]] = [
        {"sampler": "heun", "steps": 4},
        {"sampler": "midpoint", "steps": 3, "guidance_scale": 2.0},
        {"sampler": "fireflow", "steps": 5},
        {"sampler": "pseudo", "steps": 6, "guidance_scale": 2.0, "guidance_interval": (0.9, 0.3)},
        {"sampler": "H1P5R3"},
        {"sampler": "perflow[windows=3]", "steps": 5},
        {"sampler": "instaflow", "steps": 1},
        {"sampler": "euler-sde[eta=0.3]", "steps": 6},
        {"guidance_scale": 2.0, "guidance_mode": "onetime-negative", "residual_strength": 0.5},
        {"sampler": "flowedit", "steps": 8, "source_prompt": "a large red circle on a white background", **edited},
        {"sampler": "H1P3R1", **edited},
    ]
    asked = [Wish("a large blue circle on a white background", {"seed": k, **each}) for k, each in enumerate(options)]
    answers = await asyncio.gather(*(wish.ask(client) for wish in asked))
    for wish, files in zip(asked, answers, strict=True):
        assert files == wish.fuse(fused), wish


async def test_forty_concurrent_requests_share_one_mixed_batch(
    deployment: LocalDeployment, client: AsyncClient, fused: Pipeline
) -> None:
    names = ("denoiser-1", "decoder-1", "decoder-2")
    before = [await counters(deployment, name) for name in names]
    asked = wishes(40, first_seed=5)
    answers = await asyncio.gather(*(wish.ask(client) for wish in asked))
    for wish, files in zip(asked, answers, strict=True):
        assert files == wish.fuse(fused), wish
    after = [await counters(deployment, name) for name in names]
    # A decoder counts an image after it has stored it.
    ended = sum(old.get("ended_total", 0) for old in before[1:]) + 40
    async with asyncio.timeout(20):
        while sum(now["ended_total"] for now in after[1:]) < ended:
            after = [await counters(deployment, name) for name in names]
    denoiser, *decoders = [
        {name: new[name] - old.get(name, 0) for name in new} for old, new in zip(before, after, strict=True)
    ]
    # The engine's own records: network calls with several timesteps, and fewer ticks than steps one by one.
    assert denoiser["images_total"] == 40
    assert denoiser["mixed_ticks_total"] > denoiser["ticks_total"] / 2
    assert denoiser["ticks_total"] < sum(wish.options["steps"] for wish in asked) / 2
    # Both decoders worked, and each image was finished once.
    assert all(decoder["ended_total"] > 0 for decoder in decoders)
    assert sum(decoder["ended_total"] for decoder in decoders) == 40


async def test_without_deterministic_mode_the_differences_are_rounding(
    shapes: Path, fused: Pipeline, record_property: pytest.RecordProperty
) -> None:
    """Eager torch changes the last bits with the number of rows; that must stay invisible."""
    stage = DenoiserStage.load(shapes, device="cpu")
    encoded = [fused._encoder.encode([_text(wish)])[0] for wish in wishes(8)]
    jobs = [
        DenoiseJob(
            one.conditioning,
            wish.options["steps"],
            Guidance(wish.options["guidance_scale"]),
            "euler",
            wish.options["seed"],
            stage.card.default_height,
            stage.card.default_width,
        )
        for wish, one in zip(wishes(8), encoded, strict=True)
    ]
    together = np.stack(stage.run(jobs))
    alone = np.stack([stage.run([job])[0] for job in jobs])
    pixels = [fused._decoder.decode(latents, fused._kind).astype(int) for latents in (together, alone)]
    largest = {"latents": float(np.abs(together - alone).max()), "pixels": int(np.abs(pixels[0] - pixels[1]).max())}
    record_property("largest difference", largest)
    print(f"largest difference between alone and in a batch of 8: {largest}")
    assert largest["latents"] < 1e-4
    assert largest["pixels"] <= 1


def _text(wish: Wish) -> object:
    from streamflow.types import EncodeJob

    return EncodeJob({Role.TARGET: wish.prompt, Role.NEGATIVE: wish.options.get("negative_prompt", "")})
