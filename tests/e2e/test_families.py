"""Real checkpoints' families through the four services over Redis, held to diffusers' own pipelines."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from PIL import Image

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.pipeline import Pipeline
from streamflow.transport import codec
from streamflow.v1 import denoiser_pb2, denoiser_pb2_grpc, encoder_pb2, encoder_pb2_grpc
from tests.checkpoints.extras import UNET_LAYERS, save_adapter, save_control
from tests.checkpoints.sd import save_sd_checkpoint
from tests.checkpoints.text import T5_TOKENS
from tests.checkpoints.transformers import save_sd3_checkpoint, save_sit_checkpoint
from tests.families.reference import PeRFlow, load_sd, load_sd3, relative, seeded

PROMPT, NEGATIVE = "a red ring", "blue"

Reference = Callable[..., Any]
"""(guidance_scale, steps, height, width, seed, output_type) -> pictures or latents of diffusers' pipeline."""


def perflow(folder: Path) -> tuple[Path, Mapping[str, str], Reference]:
    save_sd_checkpoint(folder, diffusion=True)
    pipeline = load_sd(folder, PeRFlow())

    def reference(**call: Any) -> Any:
        return pipeline(PROMPT, negative_prompt=NEGATIVE, **call).images[0]

    return folder, {"flow": "perflow"}, reference


def sd3(folder: Path) -> tuple[Path, Mapping[str, str], Reference]:
    save_sd3_checkpoint(folder)
    pipeline = load_sd3(folder)

    def reference(**call: Any) -> Any:
        return pipeline(PROMPT, negative_prompt=NEGATIVE, max_sequence_length=T5_TOKENS, **call).images[0]

    return folder, {}, reference


@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [perflow, sd3])
async def test_pictures_and_latents_are_those_of_the_reference(
    tmp_path: Path, make: Callable[[Path], tuple[Path, Mapping[str, str], Reference]]
) -> None:
    folder, settings, reference = make(tmp_path / "checkpoint")
    every = [(steps, scale, size) for steps in (4, 28) for scale in (1.0, 4.5) for size in ((64, 64), (64, 96))]
    async with (
        LocalDeployment(model=folder, settings={"device": "cpu", **settings}) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        results = await asyncio.gather(
            *(
                client.generate(
                    PROMPT,
                    negative_prompt=NEGATIVE,
                    steps=steps,
                    guidance_scale=scale,
                    height=height,
                    width=width,
                    seed=seed,
                    decoder="full",
                )
                for seed, (steps, scale, (height, width)) in enumerate(every)
            )
        )
        latents = await denoised(deployment, steps=4, guidance_scale=4.5, height=64, width=96, seed=9)
    for seed, ((steps, scale, (height, width)), result) in enumerate(zip(every, results, strict=True)):
        expected = reference(
            guidance_scale=scale, num_inference_steps=steps, height=height, width=width, generator=seeded(seed)
        )
        given = np.asarray(Image.open(io.BytesIO(result.files[0])), dtype=int)
        assert np.abs(given - np.asarray(expected, dtype=int)).max() <= 1, (steps, scale, height, width)
    theirs = reference(
        guidance_scale=4.5, num_inference_steps=4, height=64, width=96, generator=seeded(9), output_type="latent"
    )
    assert relative(latents, theirs.numpy()) < 1e-4


async def denoised(deployment: LocalDeployment, **wanted: Any) -> np.ndarray:
    """Latents from the encoder's and the denoiser's own gRPC services."""
    async with (
        grpc.aio.insecure_channel(deployment.addresses["encoder-1"]) as encoder,
        grpc.aio.insecure_channel(deployment.addresses["denoiser-1"]) as denoiser,
    ):
        encoded = await encoder_pb2_grpc.TextEncoderStub(encoder).Encode(
            encoder_pb2.EncodeRequest(prompts=[PROMPT, NEGATIVE])
        )
        target, negative = encoded.conditionings
        request = denoiser_pb2.DenoiseRequest(conditioning=target, negative_conditioning=negative, **wanted)
        last = None
        async for event in denoiser_pb2_grpc.DenoiserStub(denoiser).Denoise(request):
            last = event
        assert last is not None
        return codec.from_pb(last.latents, field="latents")


@pytest.mark.nightly
@pytest.mark.timeout(300)
async def test_adapters_and_a_control_in_requests(tmp_path: Path) -> None:
    """Beside a plain request, all through one denoiser; each as if alone."""
    folder = save_sd_checkpoint(tmp_path / "sd", diffusion=True)
    (tmp_path / "adapters").mkdir()
    ink = tmp_path / "adapters" / "ink.safetensors"
    save_adapter(load_sd(folder, PeRFlow()), ink, network="unet", layers=UNET_LAYERS, text=True)
    save_control(load_sd(folder, PeRFlow()).unet, tmp_path / "controls" / "edges")
    edges = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    settings = {
        "device": "cpu",
        "flow": "perflow",
        "adapters": tmp_path / "adapters",
        "controls": tmp_path / "controls",
        "deterministic": True,
    }
    steered = {"control": "edges", "control_image": edges, "control_scale": 0.5}
    options = [{}, {"adapters": {"ink": 0.7}}, steered, {"adapters": ["ink"], **steered}]
    fused = Pipeline.from_pretrained(
        folder,
        flow="perflow",
        adapters=settings["adapters"],
        controls=settings["controls"],
        device="cpu",
        deterministic=True,
    )
    async with (
        LocalDeployment(model=folder, settings=settings) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        (model,) = await client.models()
        assert (model.adapters, model.controls) == (("ink",), ("edges",))
        made = await asyncio.gather(*(client.generate(PROMPT, steps=4, seed=3, **one) for one in options))
        for wrong, message in (
            ({"adapters": ["oil"]}, "adapters: got 'oil'; allowed: one of ink"),
            ({"control": "edges"}, "control.image: got 'none'; allowed: what edges reads"),
            ({"control": "edges", "control_image": b"no picture"}, "control.image: got"),
        ):
            with pytest.raises(ValueError, match=message):
                await client.generate(PROMPT, **wrong)
    for one, result in zip(options, made, strict=True):
        expected = fused(PROMPT, steps=4, seed=3, output="np", **one).images[0]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(result.files[0]))), expected), one
    assert len({result.files[0] for result in made}) == len(options)


@pytest.mark.nightly
@pytest.mark.timeout(300)
async def test_labels_in_place_of_prompts(tmp_path: Path) -> None:
    """Two labels with two pictures each; the last of them alone is the same."""
    folder = save_sit_checkpoint(tmp_path / "sit")
    settings = {"device": "cpu", "deterministic": True}
    async with (
        LocalDeployment(model=folder, settings=settings) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        (model,) = await client.models()
        assert (model.family, model.class_labels) == ("sit", 10)
        several = await client.generate(class_labels=[7, 2], num_images=2, steps=4, seed=3, guidance_scale=4.0)
        alone = await client.generate(class_labels=[2], steps=4, seed=6, guidance_scale=4.0)
        assert len(set(several.files)) == 4
        assert several.files[3] == alone.files[0]
        with pytest.raises(ValueError, match="class_labels: got 10; allowed: 0 to 9"):
            await client.generate(class_labels=[10])
        with pytest.raises(ValueError, match=r"prompts: got '1'; allowed: none; sit takes class_labels"):
            await client.generate("a cat")
