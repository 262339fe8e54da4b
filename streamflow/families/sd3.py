"""Stable Diffusion 3 and 3.5: three text encoders (T5 may be missing), a joint transformer, 16 latent channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamflow.families import text
from streamflow.families.autoencoders import latent_factor
from streamflow.families.base import Denoiser, TextEncoder
from streamflow.families.card import make_card
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.flows import Usage, flow_matching
from streamflow.families.libraries import Weights, from_diffusers
from streamflow.families.networks import latent_size, opened
from streamflow.flow.programs import BASE
from streamflow.types import ModelCard

if TYPE_CHECKING:
    from torch import Tensor

    from streamflow.backends.parts import OpenPart, Part

FOLDERS = (
    *(f"tokenizer{number}" for number in ("", "_2", "_3")),
    *(f"text_encoder{number}" for number in ("", "_2", "_3")),
    *("transformer", "vae", "tiny_vae", "scheduler"),
)
TINY = "madebyollin/taesd3"
USAGE = Usage("euler", 28, 7.0)
T5_TOKENS = 256
"""To which prompts are padded for T5, in place of which there are as many zeros where it is missing."""


def describe(checkpoint: Checkpoint) -> ModelCard:
    config = checkpoint.config("transformer")
    factor, patch = latent_factor(checkpoint), config["patch_size"]
    side = config["sample_size"] * factor
    return make_card(
        checkpoint,
        family="sd3",
        parts=FOLDERS,
        flow=flow_matching(checkpoint, pipeline_sigmas=False),
        usage=USAGE,
        size_px=(side, side),
        max_px=config["pos_embed_max_size"] * patch * factor,
        patch=patch,
        latent_channels=config["in_channels"],
        max_prompt_tokens=_t5_tokens(checkpoint) if checkpoint.has("text_encoder_3") else text.clip_tokens(checkpoint),
    )


def towers(checkpoint: Checkpoint, card: ModelCard) -> list[text.TowerSpec]:
    clip = (text.PROJECTED_CLIP, text.clip_tokens(checkpoint), text.hidden_and_pooled, "hidden_and_pooled")
    found = [text.TowerSpec(1, *clip), text.TowerSpec(2, *clip)]
    if checkpoint.has("text_encoder_3"):
        found.append(text.TowerSpec(3, text.T5, card.max_prompt_tokens, text.last_hidden, "hidden"))
    return found


def load_text_encoder(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> TextEncoder:
    widths = [(one["hidden_size"], one["projection_dim"]) for one in _clip_configs(checkpoint)]
    joint, zeros = checkpoint.config("transformer")["joint_attention_dim"], _t5_tokens(checkpoint)

    def combine(outputs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        import torch
        from torch.nn.functional import pad

        split = [text.split(both, *width) for both, width in zip(outputs, widths, strict=False)]
        clip = torch.cat([hidden for hidden, _ in split], dim=-1)
        t5 = outputs[2] if len(outputs) > 2 else clip.new_zeros(len(clip), zeros, joint)
        return {
            "prompt_embeds": torch.cat([pad(clip, (0, joint - clip.shape[-1])), t5], dim=1),
            "pooled_prompt_embeds": torch.cat([pooled for _, pooled in split], dim=-1),
        }

    return text.open_towers(towers(checkpoint, card), checkpoint, card, open_part, combine)


def networks(checkpoint: Checkpoint, card: ModelCard) -> Mapping[str, Part]:
    from streamflow.backends.parts import ROWS, Input, Part

    inputs = {
        "latents": Input((ROWS, card.latent_channels, "height", "width")),
        "timestep": Input((ROWS,), below=1000, exact=True),
        **{name: Input((ROWS, *shape)) for name, shape in _conditioning(checkpoint).items()},
    }
    folder = checkpoint.folder / "transformer"
    load = Weights(from_diffusers, "SD3Transformer2DModel", folder, checkpoint.allow_pickle)
    size, factor = latent_size(card), card.latent_factor
    return {BASE: Part("transformer", card.weights_revision, inputs, "velocity", load, _call, size, factor)}


def load_denoiser(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> Denoiser:
    return Denoiser(opened(networks(checkpoint, card), open_part), card, _conditioning(checkpoint))


def _conditioning(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    config = checkpoint.config("transformer")
    tokens = text.clip_tokens(checkpoint) + _t5_tokens(checkpoint)
    return {
        "prompt_embeds": (tokens, config["joint_attention_dim"]),
        "pooled_prompt_embeds": (config["pooled_projection_dim"],),
    }


def _clip_configs(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    return [checkpoint.config("text_encoder"), checkpoint.config("text_encoder_2")]


def _t5_tokens(checkpoint: Checkpoint) -> int:
    return int(checkpoint.recommended.get("t5_tokens", T5_TOKENS))


def _call(
    network: Any, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor
) -> Tensor:
    output: Tensor = network(
        hidden_states=latents,
        timestep=timestep,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]
    return output
