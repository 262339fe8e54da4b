"""FLUX.1 schnell and dev: CLIP's pooled state and T5, a transformer on packed latents, 16 latent channels.

Guidance was distilled into dev: `guidance_scale` is an input of its network, which schnell does not have. Guidance with
a negative prompt, and a second row for it, is `true_cfg_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from streamflow.families import text
from streamflow.families.autoencoders import latent_factor
from streamflow.families.base import Denoiser, TextEncoder
from streamflow.families.card import make_card
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.flows import Usage, flow_matching
from streamflow.families.libraries import Weights, from_diffusers
from streamflow.families.networks import latent_size, opened
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import BASE
from streamflow.types import ModelCard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from streamflow.backends.parts import OpenPart, Part

FOLDERS = (
    *("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    *("transformer", "vae", "tiny_vae", "scheduler"),
)
TINY = "madebyollin/taef1"
DEV, SCHNELL = Usage("euler", 28, 3.5), Usage("euler", 4, 0.0)
DEV_TOKENS, SCHNELL_TOKENS = 512, 256
PATCH = 2
DEFAULT_LATENTS, MAX_LATENTS = 128, 256
"""Sides in latents, which no config says: the reference pipeline's default, and twice that."""


def describe(checkpoint: Checkpoint) -> ModelCard:
    config, factor = checkpoint.config("transformer"), latent_factor(checkpoint)
    distilled = config.get("guidance_embeds", False)
    side = checkpoint.recommended.get("default_size", DEFAULT_LATENTS * factor)
    return make_card(
        checkpoint,
        family="flux",
        parts=FOLDERS,
        # The network multiplies by 1000 itself.
        flow=replace(flow_matching(checkpoint, pipeline_sigmas=True), timestep_scale=1.0),
        usage=DEV if distilled else SCHNELL,
        size_px=(side, side),
        max_px=MAX_LATENTS * factor,
        patch=PATCH,
        latent_channels=config["in_channels"] // PATCH**2,
        max_prompt_tokens=checkpoint.recommended.get("t5_tokens", DEV_TOKENS if distilled else SCHNELL_TOKENS),
        embedded_guidance=True,
    )


def towers(checkpoint: Checkpoint, card: ModelCard) -> list[text.TowerSpec]:
    return [
        text.TowerSpec(1, text.CLIP, text.clip_tokens(checkpoint), text.pooled, "pooled_prompt_embeds"),
        text.TowerSpec(2, text.T5, card.max_prompt_tokens, text.last_hidden, "prompt_embeds"),
    ]


def load_text_encoder(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> TextEncoder:
    return text.open_towers(
        towers(checkpoint, card),
        checkpoint,
        card,
        open_part,
        lambda outputs: {"pooled_prompt_embeds": outputs[0], "prompt_embeds": outputs[1]},
    )


def networks(checkpoint: Checkpoint, card: ModelCard) -> Mapping[str, Part]:
    from streamflow.backends.parts import ROWS, Input, Part

    config = checkpoint.config("transformer")
    inputs = {
        "latents": Input((ROWS, card.latent_channels, "height", "width")),
        "timestep": Input((ROWS,), below=1, exact=True),
        **{name: Input((ROWS, *shape)) for name, shape in _conditioning(checkpoint, card).items()},
    }
    if config.get("guidance_embeds", False):
        inputs["guidance"] = Input((ROWS,), below=10, exact=True, shared=True)
    load = Weights(
        from_diffusers,
        "FluxTransformer2DModel",
        checkpoint.folder / "transformer",
        checkpoint.allow_pickle,
        finish=partial(_tabulate_places, places=max(card.max_height, card.max_width) // card.latent_factor // PATCH),
    )
    size, factor = latent_size(card), card.latent_factor
    return {BASE: Part("transformer", card.weights_revision, inputs, "velocity", load, _call, size, factor)}


def load_denoiser(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> Denoiser:
    distilled = checkpoint.config("transformer").get("guidance_embeds", False)
    given = {"row_inputs": _guidance} if distilled else {}
    return Denoiser(opened(networks(checkpoint, card), open_part), card, _conditioning(checkpoint, card), **given)


def _conditioning(checkpoint: Checkpoint, card: ModelCard) -> dict[str, tuple[int, ...]]:
    config = checkpoint.config("transformer")
    return {
        "prompt_embeds": (card.max_prompt_tokens, config["joint_attention_dim"]),
        "pooled_prompt_embeds": (config["pooled_projection_dim"],),
    }


def _guidance(height_px: int, width_px: int, guidance: Guidance) -> Mapping[str, Tensor]:
    import torch

    return {"guidance": torch.tensor(guidance.embedded)}


def _tabulate_places(network: Any, *, places: int) -> None:
    """Has the rotary embedding looked up rather than computed: in float64, which TensorRT has not, it is the same."""
    network.pos_embed = _rotary_table(network.pos_embed, places)


def _rotary_table(embedding: Any, places: int) -> nn.Module:
    """Stands in for diffusers' FluxPosEmbed.

    Args:
        places: along each axis, from 0.
    """
    import torch
    from torch import nn

    class RotaryTable(nn.Module):
        cos: Tensor
        sin: Tensor

        def __init__(self) -> None:
            super().__init__()
            # The same place on every axis, so each row of a table has its columns for all of them.
            cos, sin = embedding(torch.arange(places, dtype=torch.float64)[:, None].expand(-1, 3))
            self._widths = list(embedding.axes_dim)
            self.register_buffer("cos", cos.float(), persistent=False)
            self.register_buffer("sin", sin.float(), persistent=False)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            """Args: ids: places [tokens, 3]. Returns: cosines and sines, float32 [tokens, sum(axes_dim)]."""
            found = []
            for table in (self.cos, self.sin):
                columns = torch.split(table, self._widths, dim=1)
                found.append(torch.cat([column[ids[:, axis]] for axis, column in enumerate(columns)], dim=1))
            return found[0], found[1]

    return RotaryTable()


def _call(
    network: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    guidance: Tensor | None = None,
) -> Tensor:
    rows, channels, height, width = latents.shape
    packed: Tensor = network(
        hidden_states=_pack(latents),
        timestep=timestep,
        guidance=guidance,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        txt_ids=_text_places(prompt_embeds),
        img_ids=_places(latents),
        return_dict=False,
    )[0]
    squares = packed.view(rows, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)


def _pack(latents: Tensor) -> Tensor:
    """[rows, C, H, W] to a token for every square of 2 x 2: [rows, H W / 4, 4 C]."""
    rows, channels, height, width = latents.shape
    squares = latents.view(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * PATCH**2)


def _places(latents: Tensor) -> Tensor:
    """Of each token in the picture: int64 [tokens, 3], which are 0, row and column."""
    import torch

    height, width = latents.shape[2] // PATCH, latents.shape[3] // PATCH
    down = torch.arange(height, device=latents.device)[:, None].expand(height, width)
    across = torch.arange(width, device=latents.device)[None].expand(height, width)
    return torch.stack([torch.zeros_like(down), down, across], dim=-1).reshape(-1, 3)


def _text_places(prompt_embeds: Tensor) -> Tensor:
    """All at 0: int64 [tokens, 3]."""
    import torch

    return torch.zeros(prompt_embeds.shape[1], 3, dtype=torch.int64, device=prompt_embeds.device)
