"""Stable Diffusion XL: two CLIP text encoders, a UNet that is told sizes and crops, an AutoencoderKL.

Served are UNets that were made flows: PeRFlow's, and rectified ones with a flow-matching scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamflow.families import text, unet
from streamflow.families.base import Denoiser, TextEncoder
from streamflow.families.card import make_card
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.flows import Usage, diffusion_flow, flow_name
from streamflow.families.networks import opened
from streamflow.flow.guidance import Guidance
from streamflow.types import ModelCard

if TYPE_CHECKING:
    from torch import Tensor

    from streamflow.backends.parts import OpenPart, Part

FOLDERS = (
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "unet",
    "unet_refiner",
    "vae",
    "tiny_vae",
    "scheduler",
)
TINY = "madebyollin/taesdxl"
USAGE = Usage("euler", 8, 2.0)
TIME_IDS = 6
"""Original height and width, crop from top and left, target height and width."""


def describe(checkpoint: Checkpoint) -> ModelCard:
    flow, usage = diffusion_flow(checkpoint, prediction="ddim_eps", recommended=USAGE)
    return make_card(
        checkpoint,
        family="sdxl",
        parts=FOLDERS,
        flow=unet.with_refiner(checkpoint, flow),
        flow_name=flow_name(checkpoint),
        usage=usage,
        size_px=unet.default_size(checkpoint),
        latent_channels=checkpoint.config(unet.UNET)["in_channels"],
        max_prompt_tokens=text.clip_tokens(checkpoint),
    )


def towers(checkpoint: Checkpoint, card: ModelCard) -> list[text.TowerSpec]:
    tokens = card.max_prompt_tokens
    return [
        text.TowerSpec(1, text.CLIP, tokens, text.penultimate, "hidden"),
        text.TowerSpec(2, text.PROJECTED_CLIP, tokens, text.hidden_and_pooled, "hidden_and_pooled"),
    ]


def load_text_encoder(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> TextEncoder:
    second = checkpoint.config("text_encoder_2")

    def combine(outputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        import torch

        hidden, pooled = text.split(outputs[1], second["hidden_size"], second["projection_dim"])
        return {"prompt_embeds": torch.cat([outputs[0], hidden], dim=-1), "pooled_prompt_embeds": pooled}

    # Where no negative prompt is given; so were the base models trained.
    zero = bool(checkpoint.index.get("force_zeros_for_empty_prompt", True))
    return text.open_towers(towers(checkpoint, card), checkpoint, card, open_part, combine, empty_is_zero=zero)


def networks(checkpoint: Checkpoint, card: ModelCard) -> Mapping[str, Part]:
    return unet.networks(checkpoint, card, _conditioning(checkpoint, card), _call, shared={"time_ids": (TIME_IDS,)})


def load_denoiser(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> Denoiser:
    found = opened(networks(checkpoint, card), open_part)
    return Denoiser(found, card, _conditioning(checkpoint, card), _time_ids)


def _conditioning(checkpoint: Checkpoint, card: ModelCard) -> dict[str, tuple[int, ...]]:
    config = checkpoint.config(unet.UNET)
    pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
    return {
        "prompt_embeds": (card.max_prompt_tokens, config["cross_attention_dim"]),
        "pooled_prompt_embeds": (pooled,),
    }


def _time_ids(height_px: int, width_px: int, guidance: Guidance) -> Mapping[str, Tensor]:
    """As for a picture that was neither scaled nor cropped."""
    import torch

    return {"time_ids": torch.tensor([height_px, width_px, 0, 0, height_px, width_px], dtype=torch.float32)}


def _call(
    network: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    time_ids: Tensor,
) -> Tensor:
    told = arguments(prompt_embeds, pooled_prompt_embeds, time_ids)
    output: Tensor = network(latents, timestep, return_dict=False, **told)[0]
    return output


def arguments(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, time_ids: Tensor) -> Mapping[str, Any]:
    """The conditioning as the UNet and its ControlNets take it."""
    return {
        "encoder_hidden_states": prompt_embeds,
        "added_cond_kwargs": {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids},
    }
