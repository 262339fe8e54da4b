"""Slots: the state of the images under way, as rows of a few tensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streamflow.flow.programs import COLUMNS, Op, Program

CONDITIONAL, UNCONDITIONAL = 0, 1
"""Index of the two conditionings of a slot."""


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image to run, on the CPU in float32.

    Attributes:
        handle: the caller's name for it; unique among the images under way.
        noise: [C, H, W].
        conditioning: named tensors without a batch axis.
        unconditional: the same names and shapes; needed where an op of the program is guided.
        source, mask: [C, H, W] clean latents; [H, W] in [0, 1], 1 = repaint.
        seed: of the draws of a stochastic program.
        preview_interval: a preview after every so many ops; 0 = none.
    """

    handle: Hashable
    program: Program
    noise: Tensor
    conditioning: Mapping[str, Tensor]
    unconditional: Mapping[str, Tensor] | None = None
    source: Tensor | None = None
    mask: Tensor | None = None
    seed: int = 0
    preview_interval: int = 0

    @property
    def layout(self) -> Layout:
        """Images of one layout share a slot table and network calls."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(self.conditioning.items()))
        return Layout(tuple(self.noise.shape), shapes)


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of a slot table: the latents [C, H, W], and each conditioning tensor."""

    latents: tuple[int, ...]
    conditioning: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(slots=True, eq=False)
class Slot:
    """One image under way: where it is in its program, and which row of its table holds its tensors."""

    image: Image
    row: int
    op_index: int = 0

    @property
    def op(self) -> Op:
        return self.image.program.ops[self.op_index]

    @property
    def finished(self) -> bool:
        return self.op_index == len(self.image.program)


class SlotTable:
    """The tensors of all slots of one layout.

    Args:
        layout: what each row holds.
        capacity: rows.
        device: where the tensors live.
        dtype: float32; float64 in tests of the mathematics.

    Attributes:
        latents, velocity: [capacity, C, H, W]: `x` and `c` of the programs.
        source, noise: [capacity, C, H, W]: `z0` and `n0`.
        mask: [capacity, 1, H, W]; 1 where the image may change.
        conditioning: by name [capacity, 2, ...].
        programs: [capacity, ops, len(COLUMNS)]: the coefficients, on the device once for the life of a slot.
    """

    def __init__(
        self, layout: Layout, *, capacity: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.layout, self.capacity = layout, capacity
        self._device, self._dtype = device, dtype
        self.latents, self.velocity, self.source, self.noise = (self._zeros(*layout.latents) for _ in range(4))
        self.mask = self._zeros(1, *layout.latents[1:])
        self.conditioning = {name: self._zeros(2, *shape) for name, shape in layout.conditioning}
        self.programs = self._zeros(1, len(COLUMNS))
        self._free = list(range(capacity - 1, -1, -1))
        self._slots: dict[int, Slot] = {}

    @property
    def slots(self) -> list[Slot]:
        """The slots in use, in order of their rows."""
        return [self._slots[row] for row in sorted(self._slots)]

    @property
    def free(self) -> int:
        return len(self._free)

    def allocate(self, image: Image) -> Slot:
        """Takes a row for the image and writes its tensors there; the caller has checked that one is free."""
        row = self._free.pop()
        try:
            self._write(row, image)
        except BaseException:
            self._free.append(row)
            raise
        slot = self._slots[row] = Slot(image, row)
        return slot

    def release(self, slot: Slot) -> None:
        del self._slots[slot.row]
        self._free.append(slot.row)

    def check_integrity(self) -> None:
        """Every row is either free or in use, once."""
        rows = sorted([*self._free, *self._slots])
        assert rows == list(range(self.capacity)), f"rows {rows} of {self.capacity}"
        assert all(slot.row == row for row, slot in self._slots.items())

    def _write(self, row: int, image: Image) -> None:
        source = image.source if image.source is not None else torch.zeros_like(image.noise)
        start = image.program.start_z * source + image.program.start_n * image.noise
        for table, value in ((self.latents, start), (self.source, source), (self.noise, image.noise)):
            table[row].copy_(value, non_blocking=True)
        # A slot's row was another image's before: 0 * nan is nan, so a stale velocity must not survive.
        self.velocity[row].zero_()
        self.mask[row].fill_(1.0)
        if image.mask is not None:
            self.mask[row, 0].copy_(image.mask, non_blocking=True)
        for role, tensors in ((CONDITIONAL, image.conditioning), (UNCONDITIONAL, image.unconditional)):
            for name, tensor in (tensors or {}).items():
                self.conditioning[name][row, role].copy_(tensor, non_blocking=True)
        self._write_program(row, image.program)

    def _write_program(self, row: int, program: Program) -> None:
        coefficients = program.coefficients.to(self._dtype)
        missing = len(coefficients) - self.programs.shape[1]
        if missing > 0:
            self.programs = torch.cat([self.programs, self._zeros(missing, len(COLUMNS))], dim=1)
        self.programs[row, : len(coefficients)].copy_(coefficients, non_blocking=True)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.capacity, *shape, device=self._device, dtype=self._dtype)
