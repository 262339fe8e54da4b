"""What the families with a UNet share: its parts, its refiner, its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from streamflow.families.autoencoders import latent_factor
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.libraries import Weights, from_diffusers, one_file, refused
from streamflow.families.networks import latent_size, refiner
from streamflow.flow.programs import BASE, REFINER
from streamflow.flow.spec import FlowSpec
from streamflow.types import ModelCard

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from streamflow.backends.parts import Input, Part

UNET, UNET_REFINER = "unet", "unet_refiner"


def default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width in pixels."""
    sample, factor = checkpoint.config(UNET)["sample_size"], latent_factor(checkpoint)
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * factor, width * factor


def with_refiner(checkpoint: Checkpoint, flow: FlowSpec) -> FlowSpec:
    """The flow with the checkpoint's refiner, where both are there and go together: no window has use for one."""
    if flow.windows is not None:
        return flow
    return replace(flow, refiner=refiner(checkpoint, UNET_REFINER, checkpoint.config(UNET)["in_channels"]))


def networks(
    checkpoint: Checkpoint,
    card: ModelCard,
    conditioning: Mapping[str, tuple[int, ...]],
    call: Callable[..., Tensor],
    *,
    shared: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Mapping[str, Part]:
    """The UNet and its refiner, where there is one.

    Args:
        conditioning: shapes of what each row is conditioned on, without a batch axis.
        call: (unet, latents, timestep, *conditioning, *shared) -> output.
        shared: shapes of what rows are fed besides, whatever they are conditioned on.
    """
    from streamflow.backends.parts import ROWS, Input

    told = {name: Input((ROWS, *shape)) for name, shape in conditioning.items()}
    told |= {name: Input((ROWS, *shape), shared=True) for name, shape in shared.items()}
    parts = {BASE: _part(checkpoint, UNET, card, told, call)}
    if card.flow.refiner is not None:
        parts[REFINER] = _part(checkpoint, UNET_REFINER, card, told, call)
    return parts


def _part(
    checkpoint: Checkpoint,
    name: str,
    card: ModelCard,
    told: Mapping[str, Input],
    call: Callable[..., Tensor],
) -> Part:
    from streamflow.backends.parts import ROWS, Input, Part

    inputs = {
        "latents": Input((ROWS, checkpoint.config(name)["in_channels"], "height", "width")),
        "timestep": Input((ROWS,), below=1000, exact=True),
        **told,
    }
    delta = checkpoint.unet_delta if name == UNET else None
    load = Weights(
        from_diffusers,
        "UNet2DConditionModel",
        checkpoint.folder / name,
        checkpoint.allow_pickle,
        finish=None if delta is None else partial(add_delta, delta),
    )
    return Part(name, card.weights_revision, inputs, "velocity", load, call, latent_size(card), card.latent_factor)


def add_delta(path: Path, network: Any) -> None:
    """Adds weights to a network's own: PeRFlow publishes what distillation changed, for any base model.

    Args:
        path: a safetensors file, or a folder with one.

    Raises:
        InvalidRequestError: the file is not one, or its tensors are not this network's.
    """
    import torch
    from safetensors.torch import load_file

    with refused(path):
        delta, own = load_file(one_file(path)), network.state_dict()
        foreign = [name for name, values in delta.items() if name not in own or own[name].shape != values.shape]
        if foreign:
            raise ValueError(f"{len(foreign)} of its tensors are not the network's, such as {foreign[0]}")
        with torch.no_grad():
            for name, values in delta.items():
                own[name].add_(values.to(own[name].dtype))
