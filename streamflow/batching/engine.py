"""The engine: one running batch in which every image is at its own step.

Synchronous, without threads or a clock of its own; `stages.denoiser` owns the thread that calls `tick`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from streamflow.backends.base import Network
from streamflow.batching.rows import cut
from streamflow.batching.slots import Image, Layout, Slot, SlotTable
from streamflow.batching.step import Step, StepFunction, run_step
from streamflow.errors import NOT_FINITE, GenerationError, InvalidRequestError, StreamFlowError
from streamflow.flow.programs import Op
from streamflow.types import PLAIN, SlotState, Variant

_log = logging.getLogger(__name__)

NetworkKey = tuple[str, Variant]
"""Name and variant."""

MAX_LAYOUTS = 16
"""Idle slot tables are dropped beyond this number, so that odd sizes do not fill the memory."""


@dataclass(frozen=True, slots=True)
class Progress:
    """An image finished network evaluation `step` of `steps`."""

    handle: Hashable
    step: int
    steps: int


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """Latents [C, H, W] of the data that an image expects after network evaluation `step`."""

    handle: Hashable
    step: int
    latents: np.ndarray


@dataclass(slots=True, eq=False)
class TickReport:
    """What one tick did.

    Attributes:
        retired: final latents, float32 [C, H, W], by handle.
        failed: images that ended without latents, and why.
        timesteps: what the network was fed, per slot.
        rows, padded_rows: network rows asked for, and run.
        calls: of networks.
    """

    retired: dict[Hashable, np.ndarray] = field(default_factory=dict)
    failed: dict[Hashable, StreamFlowError] = field(default_factory=dict)
    progress: list[Progress] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    rows: int = 0
    padded_rows: int = 0
    calls: int = 0


class Engine:
    """Runs images through their programs, any mix at once.

    Args:
        networks: by the names that programs use; "base" at least.
        capacity: images at once, over all layouts.
        device: where the networks and the state are.
        dtype: of the state.
        step: how a group of slots makes a step.
        variant_of: the network by its name and the variant of an image that is not the plain one.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        *,
        variant_of: Callable[[str, Variant], Network] | None = None,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        step: StepFunction = run_step,
    ) -> None:
        self.capacity, self._step, self._variant_of = capacity, step, variant_of
        self._networks, self._device, self._dtype = networks, torch.device(device), dtype
        self._tables: dict[Layout, SlotTable] = {}
        self._slots: dict[Hashable, tuple[SlotTable, Slot]] = {}

    def __len__(self) -> int:
        """Images under way."""
        return len(self._slots)

    def __repr__(self) -> str:
        return f"Engine({len(self)}/{self.capacity} slots, networks={list(self._networks)})"

    @property
    def free(self) -> int:
        return self.capacity - len(self)

    def admit(self, image: Image) -> None:
        """Gives the image a slot; it runs from the next tick on.

        Raises:
            ValueError: no slot is free, the handle is in use, or the program needs what is not there.
        """
        if not self.free:
            raise ValueError(f"all {self.capacity} slots are in use; admit after a tick retired some")
        if image.handle in self._slots:
            raise ValueError(f"image {image.handle!r} is under way already")
        self._check(image)
        table = self._table(image.layout)
        self._slots[image.handle] = (table, table.allocate(image))

    def change(self, handle: Hashable, change: Callable[[Image, Op], Image], *, restart: bool = False) -> None:
        """Exchanges an image that is under way; it goes on from its latents with the new program, texts and mask.

        Args:
            change: from the image and the op that it would run next to the new image. The new program must begin
                without using the cached velocity, which belongs to the old texts.
            restart: begin at the new image's own start instead.

        Raises:
            KeyError: no image of this handle is under way.
            ValueError: the new image has another layout, or its program needs what is not there.
        """
        table, slot = self._slots[handle]
        image = change(slot.image, slot.op)
        self._check(image)
        if image.layout != table.layout or image.handle != handle:
            raise ValueError("a change must keep the handle and the layout of an image")
        table.exchange(slot, image, restart=restart)

    def cancel(self, handle: Hashable) -> None:
        """Frees the image's slot; unknown handles are ignored, they may just have retired."""
        if handle in self._slots:
            self._release(handle)

    def suspend(self) -> dict[Hashable, SlotState]:
        """Frees every slot; where the images stood, by handle: admitted with that as `resume` they go on from there."""
        states = {handle: table.state(slot) for handle, (table, slot) in self._slots.items()}
        self.clear()
        return states

    def clear(self) -> None:
        """Frees every slot."""
        for handle in list(self._slots):
            self._release(handle)

    def tick(self) -> TickReport:
        """One network evaluation for every image under way."""
        report = TickReport()
        for table, call, slots in list(self._gather()):
            step = self._run(table, slots, call, report)
            if step is not None:
                self._update(slots, step, report)
        self._retire(report)
        return report

    def check_integrity(self) -> None:
        """The books agree: every slot under way has one row of one table."""
        for table in self._tables.values():
            table.check_integrity()
        in_tables = sum(table.capacity - table.free for table in self._tables.values())
        assert in_tables == len(self._slots), f"{in_tables} rows in use, {len(self._slots)} images"

    def _check(self, image: Image) -> None:
        networks = {op.network for op in image.program.ops}
        for name in networks - self._networks.keys():
            raise ValueError(f"the program needs the network {name!r}; loaded: {', '.join(self._networks)}")
        for role in image.program.roles - image.conditioning.keys():
            raise ValueError(f"the program needs the {role.name.lower()} conditioning")
        if image.variant != PLAIN and self._variant_of is None:
            raise ValueError(f"there is no {image.variant} of these networks")
        if image.resume and not 0 <= image.resume.ops_done < len(image.program) == image.resume.ops:
            place = f"{image.resume.ops_done} of {image.resume.ops}"
            raise ValueError(f"an image that stands at {place} cannot go on in a program of {len(image.program)}")

    def _gather(self) -> Iterator[tuple[SlotTable, NetworkKey, list[Slot]]]:
        """The slots under way in groups that one network call can serve."""
        groups: dict[tuple[Layout, NetworkKey], list[Slot]] = {}
        for layout, table in self._tables.items():
            for slot in table.slots:
                groups.setdefault((layout, (slot.op.network, slot.image.variant)), []).append(slot)
        for (layout, key), slots in groups.items():
            # A variant has the row counts of the plain network.
            for part in cut([slot.op.rows for slot in slots], self._networks[key[0]].row_counts):
                yield self._tables[layout], key, slots[part]

    def _network(self, key: NetworkKey) -> Network:
        name, variant = key
        return self._networks[name] if variant == PLAIN or not self._variant_of else self._variant_of(name, variant)

    def _run(self, table: SlotTable, slots: list[Slot], key: NetworkKey, report: TickReport) -> Step | None:
        """The group's step; when the network raises, the slots run one by one so that only the guilty one fails."""
        try:
            step = self._step(table, slots, self._network(key))
        except Exception as error:
            if len(slots) == 1:
                self._fail(slots[0], error, report)
                return None
            for slot in slots:
                alone = self._run(table, [slot], key, report)
                if alone is not None:
                    self._update([slot], alone, report)
            return None
        report.calls += 1
        report.rows += step.rows
        report.padded_rows += step.padded_rows
        return step

    def _fail(self, slot: Slot, error: Exception, report: TickReport) -> None:
        _log.exception("network failed for image %s", slot.image.handle, exc_info=error)
        step = f"step {slot.op_index + 1} of {len(slot.image.program)}"
        message = f"the network failed at {step}: {type(error).__name__}"
        # That an engine does not take this size, and what to do, is for the user.
        refused = error if isinstance(error, InvalidRequestError) else None
        report.failed[slot.image.handle] = refused or GenerationError(message, stage="denoiser")
        self._release(slot.image.handle)

    def _update(self, slots: Sequence[Slot], step: Step, report: TickReport) -> None:
        """Advances the programs and takes what is to be shown."""
        for position, slot in enumerate(slots):
            handle, shown = slot.image.handle, slot.preview_due
            report.timesteps.append(slot.op.timestep)
            slot.op_index += 1
            report.progress.append(Progress(handle, slot.ops_done, slot.ops_in_all))
            if shown and step.preview is not None:
                latents = step.preview[position].float().cpu().numpy()
                report.previews.append(Preview(handle, slot.ops_done, latents))

    def _retire(self, report: TickReport) -> None:
        for handle, (table, slot) in list(self._slots.items()):
            if not slot.finished:
                continue
            latents = table.latents[slot.row].to("cpu", torch.float32, copy=True).numpy()
            if np.isfinite(latents).all():
                report.retired[handle] = latents
            else:
                report.failed[handle] = GenerationError(NOT_FINITE, stage="denoiser")
            self._release(handle)

    def _release(self, handle: Hashable) -> None:
        table, slot = self._slots.pop(handle)
        table.release(slot)

    def _table(self, layout: Layout) -> SlotTable:
        if layout not in self._tables:
            idle = [key for key, table in self._tables.items() if table.free == table.capacity]
            for key in idle[: max(0, len(self._tables) - MAX_LAYOUTS + 1)]:
                del self._tables[key]
            self._tables[layout] = SlotTable(layout, capacity=self.capacity, device=self._device, dtype=self._dtype)
        return self._tables[layout]
