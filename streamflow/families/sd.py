"""Stable Diffusion in the layout of SD 1.5: one CLIP text encoder, a UNet, an AutoencoderKL.

Served here are checkpoints that were made rectified flows: their scheduler is a FlowMatchEulerDiscreteScheduler, the
UNet is fed `1000 sigma` and predicts the velocity `noise - data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamflow.errors import InvalidRequestError
from streamflow.families.base import Denoiser
from streamflow.families.checkpoint import read_json, recommended, weights_revision
from streamflow.families.libraries import from_diffusers, from_transformers
from streamflow.flow.programs import BASE, REFINER
from streamflow.flow.samplers import served
from streamflow.flow.schedules import ScheduleSpec
from streamflow.flow.spec import FlowSpec, RefinerSpec
from streamflow.types import DecoderKind, ModelCard, Tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from streamflow.backends.parts import OpenPart, Part, Runner

FOLDERS = ("tokenizer", "text_encoder", "unet", "unet_refiner", "vae", "tiny_vae", "scheduler")
UNET, UNET_REFINER = "unet", "unet_refiner"
DEFAULT_MAX_STEP = 0.12
"""Of a refiner whose config does not say what it was trained for: the range of FlowTurbo's own."""


def describe(folder: Path, name: str) -> ModelCard:
    unet, vae = read_json(folder, "unet/config.json"), read_json(folder, "vae/config.json")
    advice = recommended(folder)
    flow = _flow(folder, unet, advice)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    sample = unet["sample_size"]
    height, width = (sample, sample) if isinstance(sample, int) else sample
    decoders = (DecoderKind.TINY, DecoderKind.FULL) if (folder / "tiny_vae").is_dir() else (DecoderKind.FULL,)
    return ModelCard(
        name=name,
        family="sd",
        revision=weights_revision(folder, FOLDERS),
        default_width=width * factor,
        default_height=height * factor,
        size_multiple=factor,
        max_width=advice.get("max_width", 4 * width * factor),
        max_height=advice.get("max_height", 4 * height * factor),
        default_steps=advice.get("default_steps", 4),
        max_steps=advice.get("max_steps", 100),
        default_guidance_scale=advice.get("default_guidance_scale", 1.0),
        default_sampler=advice.get("default_sampler", "euler"),
        samplers=served(flow),
        decoders=decoders,
        default_decoder=DecoderKind(advice.get("default_decoder", decoders[0])),
        max_prompt_tokens=read_json(folder, "tokenizer/tokenizer_config.json")["model_max_length"],
        latent_channels=unet["in_channels"],
        latent_factor=factor,
        flow=flow,
    )


def _flow(folder: Path, unet: Mapping[str, Any], advice: Mapping[str, Any]) -> FlowSpec:
    scheduler = read_json(folder, "scheduler/scheduler_config.json")
    name = scheduler.get("_class_name")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise InvalidRequestError("model", name, "a scheduler FlowMatchEulerDiscreteScheduler: a rectified flow")
    if unet["in_channels"] != unet["out_channels"]:
        raise InvalidRequestError("model", f"UNet with {unet['in_channels']} input channels", f"{unet['out_channels']}")
    return FlowSpec(
        schedule=ScheduleSpec(shift=scheduler.get("shift", 1.0)),
        evaluates_data=advice.get("evaluates_data", True),
        refiner=_refiner(folder, unet),
    )


def _refiner(folder: Path, unet: Mapping[str, Any]) -> RefinerSpec | None:
    if not (folder / UNET_REFINER).is_dir():
        return None
    config = read_json(folder, f"{UNET_REFINER}/config.json")
    channels = unet["in_channels"]
    if (config["in_channels"], config["out_channels"]) != (2 * channels, channels):
        given = f"{UNET_REFINER} with {config['in_channels']} input and {config['out_channels']} output channels"
        allowed = f"{2 * channels} and {channels}: the latents and the last velocity in, its change out"
        raise InvalidRequestError("model", given, allowed)
    return RefinerSpec(max_step=config.get("max_step", DEFAULT_MAX_STEP), guided=config.get("guided", False))


def load_text_encoder(folder: Path, *, card: ModelCard, open_part: OpenPart) -> ClipTextEncoder:
    tokenizer = from_transformers("CLIPTokenizer").from_pretrained(folder / "tokenizer")
    return ClipTextEncoder(tokenizer, open_part(_text_encoder(folder, card)))


def load_vae_encoder(folder: Path, *, card: ModelCard, open_part: OpenPart) -> ImageEncoder:
    return ImageEncoder(open_part(_vae_encoder(folder, card)))


def load_decoder(folder: Path, kind: DecoderKind, *, card: ModelCard, open_part: OpenPart) -> Decoder:
    return Decoder(open_part(_decoder(folder, kind, card)))


def load_denoiser(folder: Path, *, card: ModelCard, open_part: OpenPart) -> Denoiser:
    from streamflow.backends.network import PartNetwork

    networks = {BASE: PartNetwork(open_part(_unet(folder, UNET, card)))}
    if card.flow.refiner is not None:
        networks[REFINER] = PartNetwork(open_part(_unet(folder, UNET_REFINER, card)), takes_velocity=True)
    width = read_json(folder, "unet/config.json")["cross_attention_dim"]
    return Denoiser(networks, card, {"prompt_embeds": (card.max_prompt_tokens, width)})


def parts(folder: Path, card: ModelCard) -> list[Part]:
    found = [_text_encoder(folder, card), _unet(folder, UNET, card)]
    if card.flow.refiner is not None:
        found.append(_unet(folder, UNET_REFINER, card))
    return [*found, _vae_encoder(folder, card), *(_decoder(folder, kind, card) for kind in card.decoders)]


# -- the networks ----------------------------------------------------------------------------------------------------


def _text_encoder(folder: Path, card: ModelCard) -> Part:
    import torch

    from streamflow.backends.parts import ROWS, Input, Part

    words = read_json(folder, "text_encoder/config.json")["vocab_size"]
    tokens = Input((ROWS, card.max_prompt_tokens), torch.int64, below=words)
    load = partial(_load, from_transformers, "CLIPTextModel", folder / "text_encoder")
    return Part("text_encoder", card.revision, {"input_ids": tokens}, "prompt_embeds", load, _call_text)


def _unet(folder: Path, name: str, card: ModelCard) -> Part:
    from streamflow.backends.parts import ROWS, Input, Part

    config = read_json(folder, f"{name}/config.json")
    inputs = {
        "latents": Input((ROWS, config["in_channels"], "height", "width")),
        "timestep": Input((ROWS,), below=1000, exact=True),
        "prompt_embeds": Input((ROWS, card.max_prompt_tokens, config["cross_attention_dim"])),
    }
    load = partial(_load, from_diffusers, "UNet2DConditionModel", folder / name)
    return Part(name, card.revision, inputs, "velocity", load, _call_unet, _latent_size(card), card.latent_factor)


def _vae_encoder(folder: Path, card: ModelCard) -> Part:
    from streamflow.backends.parts import ROWS, Input, Part

    images = Input((ROWS, 3, "height", "width"))
    sizes = {"height": card.default_height, "width": card.default_width}
    return Part(
        "vae_encoder",
        card.revision,
        {"images": images},
        "latents",
        partial(_load, from_diffusers, "AutoencoderKL", folder / "vae"),
        _call_vae_encoder,
        sizes,
    )


def _decoder(folder: Path, kind: DecoderKind, card: ModelCard) -> Part:
    from streamflow.backends.parts import ROWS, Input, Part

    latents = {"latents": Input((ROWS, card.latent_channels, "height", "width"))}
    size, factor = _latent_size(card), card.latent_factor
    if kind is DecoderKind.FULL:
        load = partial(_load, from_diffusers, "AutoencoderKL", folder / "vae")
        return Part("vae_decoder", card.revision, latents, "images", load, _call_vae_decoder, size, factor)
    if not (folder / "tiny_vae").is_dir():
        raise InvalidRequestError("decoder", kind.value, "full", f"{folder} has no tiny_vae folder")
    load = partial(_load, from_diffusers, "AutoencoderTiny", folder / "tiny_vae")
    return Part("tiny_decoder", card.revision, latents, "images", load, _call_tiny_decoder, size, factor)


def _latent_size(card: ModelCard) -> dict[str, int]:
    return {"height": card.default_height // card.latent_factor, "width": card.default_width // card.latent_factor}


def _load(
    library: Callable[[str], Any], name: str, folder: Path, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    model: nn.Module = library(name).from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return model.to(device).eval()


def _call_text(model: Any, input_ids: Tensor) -> Tensor:
    hidden: Tensor = model(input_ids).last_hidden_state
    return hidden


def _call_unet(unet: Any, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
    output: Tensor = unet(latents, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
    return output


def _call_vae_encoder(vae: Any, images: Tensor) -> Tensor:
    """To scaled latents: the mode, so no noise."""
    scaled: Tensor = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    return scaled


def _call_vae_decoder(vae: Any, latents: Tensor) -> Tensor:
    images: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return images


def _call_tiny_decoder(tiny: Any, latents: Tensor) -> Tensor:
    """Distilled to take scaled latents."""
    images: Tensor = tiny.decode(latents, return_dict=False)[0]
    return images


# -- for the stages --------------------------------------------------------------------------------------------------


class ClipTextEncoder:
    """A CLIP tokenizer and text model; prompts are padded to the tokenizer's limit, as the network was trained with."""

    def __init__(self, tokenizer: Any, runner: Runner) -> None:
        self._tokenizer, self._runner = tokenizer, runner
        self.backend = runner.name
        self.max_tokens: int = tokenizer.model_max_length

    def encode(self, prompts: Sequence[str]) -> list[Tensors]:
        """{"prompt_embeds": [tokens, width]} per prompt."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return [{"prompt_embeds": row} for row in self._runner({"input_ids": tokens.input_ids}).cpu().numpy()]

    def truncated(self, prompt: str) -> str:
        tokens = self._tokenizer(prompt, truncation=False, verbose=False).input_ids
        # The last place belongs to the end-of-text token, which a cut prompt gets too.
        cut = tokens[self.max_tokens - 1 : -1]
        text: str = self._tokenizer.decode(cut).strip() if len(tokens) > self.max_tokens else ""
        return text


class ImageEncoder:
    """The encoder half of the checkpoint's own autoencoder."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.backend = runner.name

    def encode(self, images: np.ndarray) -> np.ndarray:
        latents: np.ndarray = self._runner({"images": _tensor(images)}).cpu().numpy()
        return latents


class Decoder:
    """An autoencoder's decoder half."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.backend = runner.name

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Rounded as diffusers does."""
        decoded = self._runner({"latents": _tensor(latents)})
        unit = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        pixels: np.ndarray = (unit * 255).round().byte().cpu().numpy()
        return pixels


def _tensor(values: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))
