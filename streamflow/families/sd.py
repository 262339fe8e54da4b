"""Stable Diffusion in the layout of SD 1.5 and 2.1: one CLIP text encoder, a UNet, an AutoencoderKL.

Served are UNets that were made flows: rectified ones with a flow-matching scheduler (fed `1000 sigma`, predicting the
velocity `noise - data`), InstaFlow and 2-RF (predicting `data - noise`), and PeRFlow's windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamflow.errors import InvalidRequestError
from streamflow.families import text, unet
from streamflow.families.base import Denoiser, TextEncoder
from streamflow.families.card import make_card
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.flows import Usage, diffusion_flow, flow_name
from streamflow.families.networks import opened
from streamflow.types import ModelCard

if TYPE_CHECKING:
    from torch import Tensor

    from streamflow.backends.parts import OpenPart, Part

FOLDERS = ("tokenizer", "text_encoder", "unet", "unet_refiner", "vae", "tiny_vae", "scheduler")
TINY = "madebyollin/taesd"
USAGE = Usage("euler", 4, 1.0)


def describe(checkpoint: Checkpoint) -> ModelCard:
    flow, usage = diffusion_flow(checkpoint, prediction="diff_eps", recommended=USAGE)
    config = checkpoint.config(unet.UNET)
    if config["in_channels"] != config["out_channels"]:
        given, allowed = f"UNet with {config['in_channels']} input channels", f"{config['out_channels']}"
        raise InvalidRequestError("model", given, allowed, "inpainting UNets are not served; a mask needs none")
    return make_card(
        checkpoint,
        family="sd",
        parts=FOLDERS,
        flow=unet.with_refiner(checkpoint, flow),
        flow_name=flow_name(checkpoint),
        usage=usage,
        size_px=unet.default_size(checkpoint),
        latent_channels=config["in_channels"],
        max_prompt_tokens=text.clip_tokens(checkpoint),
    )


def towers(checkpoint: Checkpoint, card: ModelCard) -> list[text.TowerSpec]:
    return [text.TowerSpec(1, text.CLIP, card.max_prompt_tokens, text.last_hidden, "prompt_embeds")]


def load_text_encoder(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> TextEncoder:
    return text.open_towers(
        towers(checkpoint, card),
        checkpoint,
        card,
        open_part,
        lambda outputs: {"prompt_embeds": outputs[0]},
    )


def networks(checkpoint: Checkpoint, card: ModelCard) -> Mapping[str, Part]:
    return unet.networks(checkpoint, card, _conditioning(checkpoint, card), _call)


def load_denoiser(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> Denoiser:
    return Denoiser(opened(networks(checkpoint, card), open_part), card, _conditioning(checkpoint, card))


def _conditioning(checkpoint: Checkpoint, card: ModelCard) -> dict[str, tuple[int, ...]]:
    return {"prompt_embeds": (card.max_prompt_tokens, checkpoint.config(unet.UNET)["cross_attention_dim"])}


def _call(network: Any, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
    output: Tensor = network(latents, timestep, return_dict=False, **arguments(prompt_embeds))[0]
    return output


def arguments(prompt_embeds: Tensor) -> Mapping[str, Any]:
    """The conditioning as the UNet and its ControlNets take it."""
    return {"encoder_hidden_states": prompt_embeds}
