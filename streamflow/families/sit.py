"""SiT, the class-conditional model of FlowTurbo, in the layout of DiT: a label in place of a text, no text encoder.

It is fed `t = 1 - sigma` as it is, predicts `data - noise`, and its authors guide channels 0 to 2 only and drop the
half of the output that was to learn a variance. Its refiner is one block of the same kind with 8 input channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from streamflow.errors import InvalidRequestError
from streamflow.families.autoencoders import latent_factor
from streamflow.families.base import Denoiser, TextEncoder
from streamflow.families.card import make_card
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.flows import Usage, flow_matching
from streamflow.families.libraries import Weights, from_diffusers
from streamflow.families.networks import latent_size, opened, refiner
from streamflow.families.text import TowerSpec
from streamflow.flow.programs import BASE, REFINER
from streamflow.types import AdapterUse, ModelCard, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from streamflow.backends.parts import OpenPart, Part

TRANSFORMER, TRANSFORMER_REFINER = "transformer", "transformer_refiner"
FOLDERS = (TRANSFORMER, TRANSFORMER_REFINER, "vae", "tiny_vae", "scheduler")
TINY = "madebyollin/taesd"
USAGE = Usage("pseudo", 15, 4.0)
GUIDED_CHANNELS = 3


def describe(checkpoint: Checkpoint) -> ModelCard:
    config, factor = checkpoint.config(TRANSFORMER), latent_factor(checkpoint)
    # The positions of its tokens are those of one size.
    side = config["sample_size"] * factor
    flow = flow_matching(checkpoint, pipeline_sigmas=True)
    return make_card(
        checkpoint,
        family="sit",
        parts=FOLDERS,
        flow=replace(
            flow,
            timestep_scale=1.0,
            timestep_rises=True,
            velocity_sign=-1.0,
            evaluates_data=True,
            refiner=refiner(checkpoint, TRANSFORMER_REFINER, config["in_channels"], guided=True),
        ),
        usage=USAGE,
        size_px=(side, side),
        max_px=side,
        patch=config["sample_size"],
        latent_channels=config["in_channels"],
        max_prompt_tokens=1,
        class_labels=config["num_embeds_ada_norm"],
    )


def towers(checkpoint: Checkpoint, card: ModelCard) -> list[TowerSpec]:
    return []


def load_text_encoder(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> TextEncoder:
    return LabelEncoder(card.class_labels)


class LabelEncoder:
    """Implements `base.TextEncoder` for labels written as numbers; an empty one is that of no class.

    Args:
        labels: how many classes there are.
    """

    backend, max_tokens = "", 1

    def __init__(self, labels: int) -> None:
        self._labels = labels

    def encode(self, prompts: Sequence[str], adapters: Sequence[AdapterUse] = ()) -> list[Tensors]:
        """{"class_label": float32 []} per label. Raises InvalidRequestError."""
        return [{"class_label": np.array(self._number(label), np.float32)} for label in prompts]

    def relevant(self, adapters: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
        return ()

    def truncated(self, prompt: str) -> str:
        return ""

    def _number(self, label: str) -> int:
        if not label:
            return self._labels
        if not label.isdecimal() or not int(label) < self._labels:
            raise InvalidRequestError("class_labels", label, f"0 to {self._labels - 1}")
        return int(label)


def networks(checkpoint: Checkpoint, card: ModelCard) -> Mapping[str, Part]:
    parts = {BASE: _part(checkpoint, TRANSFORMER, card)}
    if card.flow.refiner is not None:
        parts[REFINER] = _part(checkpoint, TRANSFORMER_REFINER, card)
    return parts


def load_denoiser(checkpoint: Checkpoint, card: ModelCard, open_part: OpenPart) -> Denoiser:
    found = opened(networks(checkpoint, card), open_part, guided_channels=GUIDED_CHANNELS)
    return Denoiser(found, card, {"class_label": ()})


def _part(checkpoint: Checkpoint, name: str, card: ModelCard) -> Part:
    from streamflow.backends.parts import ROWS, Input, Part

    inputs = {
        "latents": Input((ROWS, checkpoint.config(name)["in_channels"], "height", "width")),
        "timestep": Input((ROWS,), below=1, exact=True),
        "class_label": Input((ROWS,), below=card.class_labels, exact=True),
    }
    folder = checkpoint.folder / name
    load = Weights(from_diffusers, "DiTTransformer2DModel", folder, checkpoint.allow_pickle, finish=_as_sit)
    call = partial(_call if name == TRANSFORMER else _call_refiner, channels=card.latent_channels)
    return Part(name, card.weights_revision, inputs, "velocity", load, call, latent_size(card), card.latent_factor)


def _as_sit(network: Any) -> None:
    """The frequencies of its time embedding are spaced otherwise than DiT's."""
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def _call(network: Any, latents: Tensor, timestep: Tensor, class_label: Tensor, *, channels: int) -> Tensor:
    output: Tensor = network(latents, timestep=timestep, class_labels=class_label.long(), return_dict=False)[0]
    # The other half, where there is one, was to learn a variance.
    return output[:, :channels]


def _call_refiner(network: Any, latents: Tensor, timestep: Tensor, class_label: Tensor, *, channels: int) -> Tensor:
    """It knows velocities as its base network gives them, `data - noise`; here they are `noise - data`."""
    import torch

    state, velocity = torch.split(latents, channels, dim=1)
    return -_call(network, torch.cat([state, -velocity], dim=1), timestep, class_label, channels=channels)
