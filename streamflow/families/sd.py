"""Stable Diffusion in the layout of SD 1.5: one CLIP text encoder, a UNet, an AutoencoderKL.

Served here are checkpoints that were made rectified flows: their scheduler is a FlowMatchEulerDiscreteScheduler, the
UNet is fed `1000 sigma` and predicts the velocity `noise - data`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamflow.errors import InvalidRequestError
from streamflow.families.base import Denoiser
from streamflow.families.checkpoint import read_json, recommended, weights_revision
from streamflow.flow.programs import BASE, REFINER
from streamflow.flow.samplers import served
from streamflow.flow.schedules import ScheduleSpec
from streamflow.flow.spec import FlowSpec, RefinerSpec
from streamflow.types import DecoderKind, ModelCard, Tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from streamflow.backends.base import Network

PARTS = ("tokenizer", "text_encoder", "unet", "unet_refiner", "vae", "tiny_vae", "scheduler")
UNET_REFINER = "unet_refiner"
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
        revision=weights_revision(folder, PARTS),
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


def load_text_encoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> ClipTextEncoder:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, use_safetensors=True)
    return ClipTextEncoder(tokenizer, model.to(device).eval())


def load_vae_encoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> KlAutoencoder:
    return KlAutoencoder(_load_vae(folder, device=device, dtype=dtype))


def load_decoder(
    folder: Path, kind: DecoderKind, *, device: torch.device, dtype: torch.dtype
) -> KlAutoencoder | TinyDecoder:
    if kind is DecoderKind.FULL:
        return KlAutoencoder(_load_vae(folder, device=device, dtype=dtype))
    if not (folder / "tiny_vae").is_dir():
        raise InvalidRequestError("decoder", kind.value, "full", f"{folder} has no tiny_vae folder")
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny.from_pretrained(folder / "tiny_vae", dtype=dtype, use_safetensors=True)
    return TinyDecoder(tiny.to(device).eval())


def load_denoiser(
    folder: Path, *, card: ModelCard, device: torch.device, dtype: torch.dtype, row_counts: tuple[int, ...] | None
) -> Denoiser:
    networks = {BASE: _load_unet(folder / "unet", device=device, dtype=dtype, row_counts=row_counts)}
    if card.flow.refiner is not None:
        networks[REFINER] = _load_unet(folder / UNET_REFINER, device=device, dtype=dtype, row_counts=row_counts)
    width = read_json(folder, "unet/config.json")["cross_attention_dim"]
    return Denoiser(networks, card, {"prompt_embeds": (card.max_prompt_tokens, width)})


def _load_unet(
    folder: Path, *, device: torch.device, dtype: torch.dtype, row_counts: tuple[int, ...] | None
) -> Network:
    from diffusers import UNet2DConditionModel

    from streamflow.backends.torch_eager import TorchNetwork

    unet = UNet2DConditionModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    takes_velocity = folder.name == UNET_REFINER
    return TorchNetwork(unet.to(device).eval(), _call_unet, row_counts=row_counts, takes_velocity=takes_velocity)


def _call_unet(unet: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    output: Tensor = unet(latents, timestep, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False)[0]
    return output


def _load_vae(folder: Path, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderKL

    vae: nn.Module = AutoencoderKL.from_pretrained(folder / "vae", dtype=dtype, use_safetensors=True)
    return vae.to(device).eval()


class ClipTextEncoder:
    """A CLIP tokenizer and text model; prompts are padded to the tokenizer's limit, as the network was trained with."""

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        self._tokenizer, self._model = tokenizer, model
        self.max_tokens: int = tokenizer.model_max_length

    def encode(self, prompts: Sequence[str]) -> list[Tensors]:
        """{"prompt_embeds": [tokens, width]} per prompt."""
        import torch

        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = self._model(tokens.input_ids.to(_device(self._model))).last_hidden_state
        return [{"prompt_embeds": row} for row in hidden.float().cpu().numpy()]

    def truncated(self, prompt: str) -> str:
        tokens = self._tokenizer(prompt, truncation=False, verbose=False).input_ids
        # The last place belongs to the end-of-text token, which a cut prompt gets too.
        cut = tokens[self.max_tokens - 1 : -1]
        text: str = self._tokenizer.decode(cut).strip() if len(tokens) > self.max_tokens else ""
        return text


class KlAutoencoder:
    """The checkpoint's own VAE, both ways; its latents are scaled to unit variance."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, images: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            moments = self._vae.encode(_to_model(images, self._vae)).latent_dist.mode()
        scaled: np.ndarray = (moments * self._vae.config.scaling_factor).float().cpu().numpy()
        return scaled

    def decode(self, latents: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            scaled = _to_model(latents, self._vae) / self._vae.config.scaling_factor
            return _to_pixels(self._vae.decode(scaled, return_dict=False)[0])


class TinyDecoder:
    """The distilled autoencoder's decoder; it takes scaled latents."""

    def __init__(self, tiny: Any) -> None:
        self._tiny = tiny

    def decode(self, latents: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return _to_pixels(self._tiny.decode(_to_model(latents, self._tiny), return_dict=False)[0])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _to_model(values: np.ndarray, module: nn.Module) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(_device(module), next(module.parameters()).dtype)


def _to_pixels(decoded: Tensor) -> np.ndarray:
    """[n, 3, H, W] in [-1, 1] to uint8 [n, H, W, 3], rounded as diffusers does."""
    unit = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    pixels: np.ndarray = (unit * 255).round().byte().cpu().numpy()
    return pixels
