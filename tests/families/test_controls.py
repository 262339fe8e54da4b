"""ControlNets against diffusers' pipelines, alone and beside images without one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from PIL import Image

from streamflow.errors import InvalidRequestError
from streamflow.families.source import open_checkpoint
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.pipeline import Pipeline
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.encoder import EncoderStage
from streamflow.types import AdapterUse, DenoiseJob, EncodeJob, Variant
from tests.checkpoints.extras import UNET_LAYERS, save_adapter, save_control
from tests.checkpoints.sd import save_sd_checkpoint, save_sdxl_checkpoint
from tests.checkpoints.transformers import save_flux_checkpoint
from tests.families.reference import PeRFlow, load_sd, load_sdxl, relative, seeded

PROMPT, NEGATIVE = "a red ring", "blue"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one adapter and one ControlNet."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("controls")
    folder = save_sd_checkpoint(root / "sd", diffusion=True)
    save_control(load_sd(folder, PeRFlow()).unet, root / "controls" / "edges")
    (root / "adapters").mkdir()
    made = root / "adapters" / "ink.safetensors"
    save_adapter(load_sd(folder, PeRFlow()), made, network="unet", layers=UNET_LAYERS)
    return root


def picture(seed: int, *, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jobs(stage: DenoiserStage, encoder: EncoderStage, *, guidance: float, **more: Any) -> DenoiseJob:
    texts = {Role.TARGET: PROMPT, Role.NEGATIVE: NEGATIVE}
    (encoded,) = encoder.encode([EncodeJob(texts)])
    return DenoiseJob(encoded.conditioning, 4, Guidance(guidance), stage.card.default_sampler, 0, 64, 64, **more)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_side_by_side_equals_the_reference(root: Path, tmp_path: Path, family: str) -> None:
    """Other pictures, scales, sizes and guidance, and an image without control, in one batch."""
    folder, controls = root / "sd", root / "controls"
    prediction = "diff_eps"
    if family == "sdxl":
        folder, controls, prediction = save_sdxl_checkpoint(tmp_path / "sdxl"), tmp_path / "controls", "ddim_eps"
        save_control(load_sdxl(folder, PeRFlow()).unet, controls / "edges")
    kind = StableDiffusionControlNetPipeline if family == "sd" else StableDiffusionXLControlNetPipeline
    reference = kind.from_pretrained(
        folder, controlnet=ControlNetModel.from_pretrained(controls / "edges"), scheduler=PeRFlow(prediction=prediction)
    )
    reference.set_progress_bar_config(disable=True)
    checkpoint = open_checkpoint(folder, flow="perflow", controls=controls)
    stage, encoder = DenoiserStage.load(checkpoint, device="cpu", slots=8), EncoderStage.load(checkpoint, device="cpu")
    cases = [(1.0, 1.0, 64), (3.0, 0.5, 64), (3.0, 2.0, 96)]
    wanted = [
        replace(
            jobs(stage, encoder, guidance=guidance),
            seed=seed,
            width=width,
            variant=Variant(control="edges"),
            control_image=picture(seed, width=width),
            control_scale=scale,
        )
        for seed, (guidance, scale, width) in enumerate(cases)
    ]
    plain = jobs(stage, encoder, guidance=3.0)
    *steered, beside = stage.run([*wanted, plain])
    for seed, ((guidance, scale, width), latents) in enumerate(zip(cases, steered, strict=True)):
        theirs = reference(
            PROMPT,
            image=Image.fromarray(picture(seed, width=width)),
            negative_prompt=NEGATIVE,
            num_inference_steps=4,
            guidance_scale=guidance,
            controlnet_conditioning_scale=scale,
            height=64,
            width=width,
            generator=seeded(seed),
            output_type="latent",
        ).images[0]
        assert relative(latents, theirs.numpy()) < 1e-4, (guidance, scale, width)
    assert relative(stage.run([plain])[0], beside) < 1e-5
    assert (
        relative(
            stage.run([replace(wanted[0], control_scale=0.0)])[0], stage.run([replace(plain, guidance=Guidance())])[0]
        )
        < 1e-5
    )


def test_a_control_and_an_adapter_together(root: Path) -> None:
    checkpoint = open_checkpoint(root / "sd", flow="perflow", controls=root / "controls", adapters=root / "adapters")
    reference = StableDiffusionControlNetPipeline.from_pretrained(
        root / "sd", controlnet=ControlNetModel.from_pretrained(root / "controls" / "edges"), scheduler=PeRFlow()
    )
    reference.set_progress_bar_config(disable=True)
    reference.load_lora_weights(root / "adapters", weight_name="ink.safetensors", adapter_name="ink")
    reference.set_adapters(["ink"], [0.6])
    theirs = reference(
        PROMPT, image=Image.fromarray(picture(7)), num_inference_steps=4, guidance_scale=1.0, generator=seeded(2)
    ).images[0]
    pipeline = Pipeline.from_pretrained(
        root / "sd",
        flow="perflow",
        controls=root / "controls",
        adapters=root / "adapters",
        device="cpu",
        decoder="full",
    )
    assert (pipeline.card.adapters, pipeline.card.controls) == (("ink",), ("edges",))
    ours = pipeline(
        PROMPT,
        steps=4,
        guidance_scale=1.0,
        seed=2,
        adapters={"ink": 0.6},
        control="edges",
        control_image=Image.fromarray(picture(7)),
        output="np",
    )
    assert np.abs(ours.images[0].astype(int) - np.asarray(theirs, dtype=int)).max() <= 1
    assert DenoiserStage.load(checkpoint, device="cpu", slots=1).card.revision == pipeline.card.revision
    for wrong, message in (
        ({"control": "edges"}, "control.image: got 'none'; allowed: what edges reads"),
        ({"control_image": Image.fromarray(picture(0))}, "control.image: got 'an image'; allowed: only with the name"),
        ({"control": "depth"}, "control: got 'depth'; allowed: one of edges"),
        (
            {"control": "edges", "control_image": Image.fromarray(picture(0)), "control_scale": -1.0},
            r"control.scale: got -1.0; allowed: 0 to 10",
        ),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            pipeline(PROMPT, **wrong)  # type: ignore[arg-type]


def test_weights_of_adapters_do_not_move_what_is_plain(root: Path) -> None:
    checkpoint = open_checkpoint(root / "sd", flow="perflow", controls=root / "controls", adapters=root / "adapters")
    stage, encoder = DenoiserStage.load(checkpoint, device="cpu", slots=8), EncoderStage.load(checkpoint, device="cpu")
    plain = jobs(stage, encoder, guidance=1.0)
    (before,) = stage.run([plain])
    stage.run([replace(plain, variant=Variant((AdapterUse("ink", 2.0),)))])
    assert np.array_equal(stage.run([plain])[0], before)


def test_what_does_not_fit_is_refused(root: Path, tmp_path: Path) -> None:
    other = shutil.copytree(root / "controls" / "edges", tmp_path / "controls" / "edges")
    config = other / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "cross_attention_dim": 24}))
    with pytest.raises(InvalidRequestError, match=r"edges'; allowed: a ControlNet whose cross_attention_dim is 16"):
        DenoiserStage.load(open_checkpoint(root / "sd", flow="perflow", controls=tmp_path / "controls"), device="cpu")
    for change, reason in (
        ({"_class_name": "ControlNetUnionModel"}, "a ControlNetModel; it is a ControlNetUnionModel"),
        ({"global_pool_conditions": True}, "without global_pool_conditions"),
    ):
        config.write_text(json.dumps({**json.loads((root / "controls/edges/config.json").read_text()), **change}))
        with pytest.raises(InvalidRequestError, match=f"controls: got .*edges'; allowed: .*{reason}"):
            DenoiserStage.load(
                open_checkpoint(root / "sd", flow="perflow", controls=tmp_path / "controls"), device="cpu"
            )
    with pytest.raises(
        InvalidRequestError, match=r"controls: got 'edges'; allowed: none: the family flux takes no Cont"
    ):
        DenoiserStage.load(
            open_checkpoint(save_flux_checkpoint(tmp_path / "flux"), controls=root / "controls"), device="cpu"
        )
    with pytest.raises(InvalidRequestError, match=r"backend: got 'onnxruntime with controls'; allowed: auto or torch"):
        DenoiserStage.load(
            open_checkpoint(root / "sd", flow="perflow", controls=root / "controls"),
            device="cpu",
            backend="onnxruntime",
        )
    stage = DenoiserStage.load(
        open_checkpoint(root / "sd", flow="perflow", controls=root / "controls"), device="cpu", slots=1
    )
    text = {"prompt_embeds": np.zeros((12, 16), np.float32)}
    job = DenoiseJob(
        dict.fromkeys(Role, text),
        4,
        Guidance(),
        "perflow",
        0,
        64,
        64,
        variant=Variant(control="edges"),
        control_image=picture(0, width=96),
    )
    with pytest.raises(InvalidRequestError, match=r"control_image: got 'uint8 \[64, 96, 3\]'; allowed: uint8 \[64, 64"):
        stage.run([job])
