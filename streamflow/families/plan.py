"""What each stage would load of a checkpoint, and how much memory that takes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamflow.families import Source, describe, parts_by_stage
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.libraries import Weights
from streamflow.families.weights import part_weights
from streamflow.types import ModelCard, Stage

if TYPE_CHECKING:
    import torch

    from streamflow.backends.parts import Part


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """A network that a stage would load.

    Attributes:
        name: as it has in `streamflow engine`.
        class_name: of its library.
        folder: of the checkpoint.
        stored: types of its tensors on disk.
        memory_bytes: of its weights, in the precision in which they would run.
    """

    stage: Stage
    name: str
    class_name: str
    folder: str
    parameters: int
    stored: tuple[str, ...]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a deployment of a checkpoint would load.

    Attributes:
        slot_bytes: what each slot of a denoiser takes besides, for a picture of the default size.
        unused: folders of the checkpoint that no stage loads.
    """

    card: ModelCard
    parts: Sequence[PlannedPart]
    slot_bytes: int
    unused: tuple[str, ...]

    def memory_bytes(self, stage: Stage, *, slots: int) -> int:
        """Weights, and slots; what networks need while they run comes on top."""
        weights = sum(part.memory_bytes for part in self.parts if part.stage is stage)
        return weights + (slots * self.slot_bytes if stage is Stage.DENOISE else 0)


def plan(source: Source, dtype: torch.dtype) -> Plan:
    """Args: dtype: in which the networks would run. Raises InvalidRequestError."""
    checkpoint = Checkpoint.of(source)
    by_stage = parts_by_stage(checkpoint)
    card = describe(checkpoint)
    planned = [_planned(stage, part, dtype) for stage, parts in by_stage.items() for part in parts]
    loaded = {part.folder for part in planned}
    others = {path.parent.name for path in checkpoint.folder.glob("*/config.json")}
    return Plan(card, planned, _slot_bytes(by_stage[Stage.DENOISE][0], card), tuple(sorted(others - loaded)))


def _planned(stage: Stage, part: Part, dtype: torch.dtype) -> PlannedPart:
    weights = part.load
    assert isinstance(weights, Weights)
    held = part_weights(weights.folder, allow_pickle=weights.allow_pickle, without=weights.without)
    return PlannedPart(
        stage,
        part.name,
        weights.class_name,
        weights.folder.name,
        held.parameters,
        held.dtypes,
        held.parameters * part.precision(dtype).itemsize,
    )


def _slot_bytes(base: Part, card: ModelCard) -> int:
    from streamflow.batching.slots import Layout, slot_bytes

    factor = card.latent_factor
    latents = (card.latent_channels, card.default_height // factor, card.default_width // factor)
    others = [(name, one) for name, one in base.inputs.items() if name not in ("latents", "timestep")]
    conditioning, inputs = (
        tuple((name, tuple(int(size) for size in one.shape[1:])) for name, one in others if one.shared == shared)
        for shared in (False, True)
    )
    return slot_bytes(Layout(latents, conditioning, inputs))
