"""What the denoising networks of all families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamflow.errors import InvalidRequestError
from streamflow.families.checkpoint import Checkpoint
from streamflow.flow.programs import REFINER
from streamflow.flow.spec import RefinerSpec
from streamflow.types import ModelCard

if TYPE_CHECKING:
    from streamflow.backends.base import Network
    from streamflow.backends.parts import OpenPart, Part

DEFAULT_MAX_STEP = 0.12
"""Of a refiner whose config does not say what it was trained for: the range of FlowTurbo's own."""


def latent_size(card: ModelCard) -> dict[str, int]:
    """Height and width of the latents of a picture of the default size."""
    factor = card.latent_factor
    return {"height": card.default_height // factor, "width": card.default_width // factor}


def refiner(checkpoint: Checkpoint, folder: str, channels: int, *, guided: bool = False) -> RefinerSpec | None:
    """Of a checkpoint that has one.

    Args:
        channels: of the latents.
        guided: whether it runs with guidance, where its config does not say.

    Raises:
        InvalidRequestError: it does not go with the latents.
    """
    if not (checkpoint.folder / folder).is_dir():
        return None
    config = checkpoint.config(folder)
    # A variance may be learned beside the change, and is left alone.
    if config["in_channels"] != 2 * channels or config["out_channels"] not in (channels, 2 * channels):
        given = f"{folder} with {config['in_channels']} input and {config['out_channels']} output channels"
        allowed = f"{2 * channels} and {channels}: the latents and the last velocity in, its change out"
        raise InvalidRequestError("model", given, allowed)
    return RefinerSpec(max_step=config.get("max_step", DEFAULT_MAX_STEP), guided=config.get("guided", guided))


def opened(parts: Mapping[str, Part], open_part: OpenPart, *, guided_channels: int | None = None) -> dict[str, Network]:
    """Args: guided_channels: see backends.base.Network."""
    from streamflow.backends.network import PartNetwork

    return {
        name: PartNetwork(open_part(part), takes_velocity=name == REFINER, guided_channels=guided_channels)
        for name, part in parts.items()
    }
