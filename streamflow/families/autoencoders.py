"""Autoencoders: between pictures and latents. All families have the same kinds, with other scales and shifts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from streamflow.errors import InvalidRequestError
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.libraries import Weights, from_diffusers
from streamflow.families.networks import latent_size
from streamflow.types import DecoderKind, ModelCard

if TYPE_CHECKING:
    from torch import Tensor

    from streamflow.backends.parts import Part, Runner


_ENCODING, _DECODING = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")
"""Modules of an autoencoder's halves."""


def latent_factor(checkpoint: Checkpoint) -> int:
    """Pixels of a picture's side in one of its latents."""
    return int(2 ** (len(checkpoint.config("vae")["block_out_channels"]) - 1))


def decoder_kinds(checkpoint: Checkpoint) -> tuple[DecoderKind, ...]:
    """Those that the checkpoint has, the fastest first."""
    return (DecoderKind.FULL,) if checkpoint.tiny_folder is None else (DecoderKind.TINY, DecoderKind.FULL)


def encoder_part(checkpoint: Checkpoint, card: ModelCard) -> Part:
    from streamflow.backends.parts import ROWS, Input, Part

    return Part(
        "vae_encoder",
        card.weights_revision,
        {"images": Input((ROWS, 3, "height", "width"))},
        "latents",
        _vae(checkpoint, without=_DECODING),
        call_encoder,
        {"height": card.default_height, "width": card.default_width},
        upcast=_upcast(checkpoint, card),
    )


def decoder_part(checkpoint: Checkpoint, kind: DecoderKind, card: ModelCard) -> Part:
    from streamflow.backends.parts import ROWS, Input, Part

    latents = {"latents": Input((ROWS, card.latent_channels, "height", "width"))}
    size, factor = latent_size(card), card.latent_factor
    if kind is DecoderKind.FULL:
        load, upcast = _vae(checkpoint, without=_ENCODING), _upcast(checkpoint, card)
        return Part(
            "vae_decoder", card.weights_revision, latents, "images", load, call_decoder, size, factor, upcast=upcast
        )
    if checkpoint.tiny_folder is None:
        raise InvalidRequestError("decoder", kind.value, "full", f"{checkpoint.folder} has no tiny_vae folder")
    folder, any_format = checkpoint.tiny_folder, checkpoint.allow_pickle
    load = Weights(from_diffusers, "AutoencoderTiny", folder, any_format, without=_ENCODING[:1])
    return Part("tiny_decoder", card.weights_revision, latents, "images", load, call_decoder, size, factor)


def _vae(checkpoint: Checkpoint, *, without: tuple[str, ...]) -> Weights:
    folder, any_format = checkpoint.folder / "vae", checkpoint.allow_pickle
    return Weights(from_diffusers, "AutoencoderKL", folder, any_format, without=without)


def _upcast(checkpoint: Checkpoint, card: ModelCard) -> bool:
    """Whether half precision overflows in it. The configs of all families say so; it is true of SDXL's."""
    return card.family == "sdxl" and bool(checkpoint.config("vae").get("force_upcast", True))


def call_encoder(vae: Any, images: Tensor) -> Tensor:
    """To scaled latents: the mode, so no noise."""
    mode, shift = vae.encode(images).latent_dist.mode(), vae.config.shift_factor
    scaled: Tensor = (mode - shift if shift else mode) * vae.config.scaling_factor
    return scaled


def call_decoder(vae: Any, latents: Tensor) -> Tensor:
    """From scaled latents; tiny autoencoders are distilled to take them as they are, which their configs say."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    plain = latents if scale == 1 else latents / scale
    images: Tensor = vae.decode(plain + shift if shift else plain, return_dict=False)[0]
    return images


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
