"""What a model family offers to the stages. Arrays go in and out, so a stage needs to know no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streamflow.flow.guidance import Guidance
from streamflow.types import AdapterUse, ModelCard, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from streamflow.backends.base import Network


class TextEncoder(Protocol):
    backend: str
    max_tokens: int

    def encode(self, prompts: Sequence[str], adapters: Sequence[AdapterUse] = ()) -> list[Tensors]:
        """Conditioning per prompt: named float32 arrays without a batch axis."""
        ...

    def relevant(self, adapters: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
        """Those of the adapters that change what prompts become."""
        ...

    def truncated(self, prompt: str) -> str:
        """The part of the prompt that does not fit, as text; empty when all of it does."""
        ...


class VaeEncoder(Protocol):
    backend: str

    def encode(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, 3, H, W] in [-1, 1] to scaled latents float32 [n, C, H / f, W / f]: the mode, so no noise."""
        ...


class LatentDecoder(Protocol):
    backend: str

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents float32 [n, C, h, w] to uint8 [n, h * f, w * f, 3]."""
        ...


RowInputs = Callable[[int, int, Guidance], Mapping[str, "Tensor"]]
"""From height and width in pixels and the guidance to float32 tensors without a batch axis."""


def _none(height_px: int, width_px: int, guidance: Guidance) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True)
class Denoiser:
    """What the denoiser runs.

    Attributes:
        networks: by the names that programs use.
        conditioning_shapes: of the tensors that a text becomes, without a batch axis.
        row_inputs: what the networks are told of a request besides its texts, such as its size.
    """

    networks: Mapping[str, Network]
    card: ModelCard
    conditioning_shapes: Mapping[str, tuple[int, ...]]
    row_inputs: RowInputs = _none

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        factor = self.card.latent_factor
        return self.card.latent_channels, height_px // factor, width_px // factor
