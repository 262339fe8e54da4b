"""ControlNets: a second network that reads a picture and steers the UNet, evaluated in the same call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamflow.errors import InvalidRequestError
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.libraries import Weights, from_diffusers, refused
from streamflow.families.unet import UNET
from streamflow.types import ModelCard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from streamflow.backends.torch_eager import TorchRunner

CONTROL_IMAGE, CONTROL_SCALE = "control_image", "control_scale"
"""What rows are fed besides: the picture in [0, 1], [rows, 3, height, width], and how strongly it acts, [rows]."""

TAKE_CONTROLS = ("sd", "sdxl")
"""Families."""

_SHARED = ("in_channels", "cross_attention_dim", "block_out_channels", "addition_embed_type")
"""Fields of the config that must be those of the UNet."""

Controlled = Callable[["nn.Module"], "TorchRunner"]
"""From a UNet, plain or with adapters, to what runs it with the ControlNet."""


def load_controls(checkpoint: Checkpoint, card: ModelCard, runner: TorchRunner) -> dict[str, Controlled]:
    """Loads every ControlNet of the checkpoint, by name.

    Args:
        runner: of the UNet.

    Raises:
        InvalidRequestError: the family takes none, or one is damaged or for another UNet.
    """
    if checkpoint.controls and card.family not in TAKE_CONTROLS:
        names = ", ".join(checkpoint.controls)
        raise InvalidRequestError("controls", names, f"none: the family {card.family} takes no ControlNets")
    return {name: _load(path, checkpoint, card, runner) for name, path in checkpoint.controls.items()}


def _load(path: Path, checkpoint: Checkpoint, card: ModelCard, runner: TorchRunner) -> Controlled:
    own, unet = _config(path), checkpoint.config(UNET)
    for name in _SHARED:
        if own.get(name) != unet.get(name):
            allowed = f"a ControlNet whose {name} is {unet.get(name)}, as the UNet's"
            raise InvalidRequestError("controls", path, allowed, f"it is {own.get(name)}")
    load = Weights(from_diffusers, "ControlNetModel", path, checkpoint.allow_pickle)
    return partial(_controlled, runner, load(runner.device, runner.dtype), card.family)


def _config(path: Path) -> Mapping[str, Any]:
    """Raises InvalidRequestError for what is no ControlNet, or one that works in another way."""
    with refused(path, field="controls", allowed="the folder of a ControlNet"):
        config: Mapping[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
    if config.get("_class_name") != "ControlNetModel":
        raise InvalidRequestError("controls", path, "a ControlNetModel", f"it is a {config.get('_class_name')}")
    if config.get("global_pool_conditions") or config.get("conditioning_channels", 3) != 3:
        allowed = "a ControlNet that reads a picture of three channels, without global_pool_conditions"
        raise InvalidRequestError("controls", path, allowed)
    return config


def _controlled(runner: TorchRunner, control: nn.Module, family: str, unet: nn.Module) -> TorchRunner:
    from torch import nn

    from streamflow.backends.parts import ROWS, Input

    both = nn.ModuleDict({"unet": unet, "control": control})
    inputs = {
        **runner.part.inputs,
        CONTROL_IMAGE: Input((ROWS, 3, "height_px", "width_px")),
        CONTROL_SCALE: Input((ROWS,), exact=True),
    }
    arguments = import_module(f"streamflow.families.{family}").arguments
    names = [name for name in runner.part.inputs if name not in ("latents", "timestep")]
    return runner.using(both, inputs=inputs, call=partial(_call, arguments=arguments, names=names))


def _call(
    both: Any,
    latents: Tensor,
    timestep: Tensor,
    *rest: Tensor,
    arguments: Callable[..., Mapping[str, Any]],
    names: list[str],
) -> Tensor:
    """Args: rest: the conditioning by `names`, the picture, and how strongly it acts."""
    *conditioning, image, scale = rest
    told = arguments(**dict(zip(names, conditioning, strict=True)))
    down, middle = both["control"](latents, timestep, controlnet_cond=image, return_dict=False, **told)
    scale = scale.to(latents.dtype).view(-1, 1, 1, 1)
    output: Tensor = both["unet"](
        latents,
        timestep,
        down_block_additional_residuals=[one * scale for one in down],
        mid_block_additional_residual=middle * scale,
        return_dict=False,
        **told,
    )[0]
    return output
