"""LoRA adapters against diffusers with peft, alone and side by side in one batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamflow import families
from streamflow.backends.torch_eager import TorchRunner
from streamflow.errors import InvalidRequestError
from streamflow.families.source import open_checkpoint
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import BASE, Role
from streamflow.pipeline import Pipeline
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.encoder import EncoderStage
from streamflow.types import AdapterUse, DenoiseJob, EncodeJob, Variant
from tests.checkpoints.extras import TRANSFORMER_LAYERS, UNET_LAYERS, save_adapter
from tests.checkpoints.sd import save_sd_checkpoint
from tests.checkpoints.text import T5_TOKENS
from tests.checkpoints.transformers import save_flux_checkpoint, save_sd3_checkpoint
from tests.families.reference import CPU, PeRFlow, load_flux, load_sd, load_sd3, relative, seeded

FLOAT = partial(TorchRunner, device=CPU, dtype=torch.float32)
PROMPT, NEGATIVE = "a red ring", "blue"
MIXES = ((), (("ink", 1.0),), (("wash", 0.5),), (("ink", 0.7), ("wash", -0.4)))


class Made(NamedTuple):
    """A checkpoint with two adapters, and diffusers' pipeline with them."""

    folder: Path
    adapters: Path
    flow: str
    reference: Any


def make(root: Path, save: Callable[[Path], Path], load: Callable[[Path], Any], network: str, flow: str) -> Made:
    folder, adapters = save(root / "checkpoint"), root / "adapters"
    layers = UNET_LAYERS if network == "unet" else TRANSFORMER_LAYERS
    adapters.mkdir()
    save_adapter(load(folder), adapters / "ink.safetensors", network=network, layers=layers, text=True)
    (adapters / "wash").mkdir()
    save_adapter(
        load(folder), adapters / "wash" / "lora.safetensors", network=network, layers=layers[:2], rank=2, seed=1
    )
    reference = load(folder)
    reference.load_lora_weights(adapters, weight_name="ink.safetensors", adapter_name="ink")
    with warnings.catch_warnings():
        # The library's own, that there is another adapter already.
        warnings.simplefilter("ignore", UserWarning)
        reference.load_lora_weights(adapters / "wash", weight_name="lora.safetensors", adapter_name="wash")
    return Made(folder, adapters, flow, reference)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sd")
    return make(root, partial(save_sd_checkpoint, diffusion=True), lambda f: load_sd(f, PeRFlow()), "unet", "perflow")


def expected(made: Made, mix: tuple[tuple[str, float], ...], **call: Any) -> np.ndarray:
    """Latents of diffusers' pipeline with these adapters."""
    if mix:
        made.reference.enable_lora()
        made.reference.set_adapters([name for name, _ in mix], [weight for _, weight in mix])
    else:
        made.reference.disable_lora()
    return made.reference(PROMPT, output_type="latent", height=64, width=64, **call).images


def jobs(made: Made, checkpoint: families.Checkpoint, *, steps: int, guidance: Guidance) -> list[DenoiseJob]:
    """One for each mix."""
    encoder = EncoderStage.load(checkpoint, device="cpu")
    sampler, texts = families.describe(checkpoint).default_sampler, {Role.TARGET: PROMPT, Role.NEGATIVE: NEGATIVE}
    made_jobs = []
    for seed, mix in enumerate(MIXES):
        uses = tuple(AdapterUse(*one) for one in mix)
        (encoded,) = encoder.encode([EncodeJob(texts, adapters=uses)])
        made_jobs.append(
            DenoiseJob(encoded.conditioning, steps, guidance, sampler, seed, 64, 64, variant=Variant(uses))
        )
    return made_jobs


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_mix_side_by_side_equals_the_reference(sd: Made, scale: float) -> None:
    checkpoint = open_checkpoint(sd.folder, flow=sd.flow, adapters=sd.adapters)
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=8)
    wanted = jobs(sd, checkpoint, steps=4, guidance=Guidance(scale))
    for seed, (mix, latents) in enumerate(zip(MIXES, stage.run(wanted), strict=True)):
        call = {"negative_prompt": NEGATIVE, "guidance_scale": scale, "num_inference_steps": 4}
        theirs = expected(sd, mix, generator=seeded(seed), **call)[0]
        assert relative(latents, theirs.numpy()) < 1e-4, mix


@pytest.mark.parametrize(
    ("save", "load"), [(partial(save_sd3_checkpoint, t5=False), load_sd3), (save_flux_checkpoint, load_flux)]
)
def test_adapters_of_transformers(tmp_path: Path, save: Callable[[Path], Path], load: Callable[[Path], Any]) -> None:
    made = make(tmp_path, save, load, "transformer", "auto")
    checkpoint = open_checkpoint(made.folder, adapters=made.adapters)
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=8)
    fed = {"guidance_scale": 2.0} if stage.card.embedded_guidance else {"guidance_scale": 1.0}
    wanted = jobs(made, checkpoint, steps=3, guidance=Guidance(embedded=2.0))
    for seed, (mix, latents) in enumerate(zip(MIXES, stage.run(wanted), strict=True)):
        call = {**fed, "num_inference_steps": 3, "max_sequence_length": T5_TOKENS}
        theirs = expected(made, mix, generator=seeded(seed), **call)
        if stage.card.family == "flux":
            theirs = made.reference._unpack_latents(theirs, 64, 64, made.reference.vae_scale_factor)
        assert relative(latents, theirs[0].numpy()) < 1e-4, mix


def test_each_image_is_as_if_alone_and_no_call_mixes_weights(sd: Made) -> None:
    """Sizes and adapters beside each other; deterministic, so to the bit."""
    checkpoint = open_checkpoint(sd.folder, flow=sd.flow, adapters=sd.adapters)
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=8, deterministic=True)
    first = jobs(sd, checkpoint, steps=4, guidance=Guidance(3.0))
    wanted = [replace(job, width=width) for job in first for width in (64, 96)]
    together = stage.run(wanted)
    for job, latents in zip(wanted, together, strict=True):
        assert np.array_equal(stage.run([job])[0], latents)
    assert len({latents.tobytes() for latents in together}) == len(wanted)


def test_mixes_beyond_those_that_are_kept_are_made_again(sd: Made) -> None:
    checkpoint = open_checkpoint(sd.folder, flow=sd.flow, adapters=sd.adapters)
    stage = DenoiserStage.load(checkpoint, device="cpu", slots=8)
    (job, *_) = jobs(sd, checkpoint, steps=4, guidance=Guidance())
    every = [replace(job, variant=Variant((AdapterUse("ink", weight),))) for weight in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    once, again = stage.run(every), stage.run(every[::-1])[::-1]
    for one, other in zip(once, again, strict=True):
        assert relative(one, other) < 1e-5


def test_what_no_adapter_changes_is_shared(sd: Made) -> None:
    from streamflow.families.adapters import Adapted, AdapterFiles

    checkpoint = open_checkpoint(sd.folder, flow=sd.flow, adapters=sd.adapters)
    runner = families.load_denoiser(checkpoint, FLOAT).networks[BASE].runner  # type: ignore[attr-defined]
    plain = {name: values.clone() for name, values in runner.module.state_dict().items()}
    layers = AdapterFiles("sd", checkpoint.adapters).into("unet", runner.module)
    merged = Adapted(runner.module, layers)([AdapterUse("ink", 2.0)])
    own = runner.module.state_dict(keep_vars=True)
    changed = {name for name, values in merged.state_dict(keep_vars=True).items() if values is not own[name]}
    assert changed == {f"{path}.weight" for path in layers["ink"]}
    assert all(torch.equal(values, own[name]) for name, values in plain.items()), "the plain network is as it was"


def test_text_parts_change_what_prompts_become_and_nothing_else_does(sd: Made) -> None:
    """So embeddings are shared between requests whose adapters leave text encoders alone."""
    stage = EncoderStage.load(open_checkpoint(sd.folder, flow=sd.flow, adapters=sd.adapters), device="cpu")
    assert stage.relevant([AdapterUse("ink", 0.5), AdapterUse("wash")]) == (AdapterUse("ink", 0.5),)
    plain, ink, wash = (
        stage.encode([EncodeJob({Role.TARGET: PROMPT}, adapters=uses)])[0].conditioning[Role.TARGET]["prompt_embeds"]
        for uses in ((), (AdapterUse("ink"),), (AdapterUse("wash"),))
    )
    assert np.array_equal(plain, wash)
    assert relative(ink, plain) > 0.01


def test_adapters_in_the_fused_pipeline(sd: Made) -> None:
    pipeline = Pipeline.from_pretrained(sd.folder, flow=sd.flow, adapters=sd.adapters, device="cpu", decoder="full")
    assert pipeline.card.adapters == ("ink", "wash")
    ours = pipeline(PROMPT, negative_prompt=NEGATIVE, steps=4, guidance_scale=3.0, seed=5, adapters={"ink": 0.7})
    call = {"negative_prompt": NEGATIVE, "guidance_scale": 3.0, "num_inference_steps": 4, "generator": seeded(5)}
    assert relative(ours.latents[0], expected(sd, (("ink", 0.7),), **call)[0].numpy()) < 1e-4
    plain, nothing = (pipeline(PROMPT, steps=4, seed=5, adapters=uses) for uses in ((), {"ink": 0}))
    assert np.array_equal(plain.latents, nothing.latents)
    for wrong, message in (
        ({"adapters": ["oil"]}, "adapters: got 'oil'; allowed: one of ink, wash"),
        ({"adapters": {"oil": 0}}, "adapters: got 'oil'; allowed: one of ink, wash"),
        ({"adapters": ["ink", "ink"]}, "adapters: got 'ink'; allowed: each name once"),
        ({"adapters": {"ink": 11}}, "adapters: got 'ink with weight 11'; allowed: -10 to 10"),
        ({"adapters": {"ink": float("nan")}}, "ink with weight nan"),
        ({"control": "canny"}, "control: got 'canny'; allowed: none: checkpoint has no controls"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            pipeline(PROMPT, **wrong)  # type: ignore[arg-type]


def test_graphs_cannot_take_adapters(sd: Made) -> None:
    checkpoint = open_checkpoint(sd.folder, flow=sd.flow, adapters=sd.adapters)
    for load in (DenoiserStage.load, EncoderStage.load):
        with pytest.raises(InvalidRequestError, match=r"backend: got 'openvino with adapters'; allowed: auto or torch"):
            load(checkpoint, device="cpu", backend="openvino")


def test_files_that_are_no_adapters_of_this_model_are_refused(sd: Made, tmp_path: Path) -> None:
    tensors = load_file(sd.adapters / "ink.safetensors")
    wrong = {
        "nothing": ({"weight": torch.zeros(2)}, "it holds no tensors of an adapter"),
        "foreign": ({f"transformer.{k}": v for k, v in tensors.items()}, "it changes none of unet, text_encoder"),
        "shape": ({k: torch.zeros(3, *v.shape[1:]) for k, v in tensors.items()}, "size mismatch|shape"),
    }
    for name, (state, reason) in wrong.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / f"{name}.safetensors")
        checkpoint = open_checkpoint(sd.folder, flow=sd.flow, adapters=tmp_path / name)
        with pytest.raises(InvalidRequestError, match=rf"adapters: got .*{name}.*a LoRA adapter of this.*({reason})"):
            DenoiserStage.load(checkpoint, device="cpu")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "cut.safetensors").write_bytes((sd.adapters / "ink.safetensors").read_bytes()[:500])
    with pytest.raises(InvalidRequestError, match="adapters: got"):
        DenoiserStage.load(open_checkpoint(sd.folder, flow=sd.flow, adapters=tmp_path / "cut"), device="cpu")


def test_adapters_are_of_the_revision_and_engines_are_not_made_anew_for_them(sd: Made) -> None:
    plain = families.describe(open_checkpoint(sd.folder, flow=sd.flow))
    with_adapters = families.describe(open_checkpoint(sd.folder, flow=sd.flow, adapters=sd.adapters))
    assert with_adapters.revision != plain.revision == plain.weights_revision
    assert with_adapters.weights_revision == plain.weights_revision
