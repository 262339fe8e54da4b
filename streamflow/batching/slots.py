"""Slots: the state of the images under way, as rows of a few tensors."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamflow.flow.programs import COLUMNS, Op, Program, Role, Term
from streamflow.types import PLAIN, SlotState, Variant

MIN_OPS = 32
"""Room for programs in a new slot table."""


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image to run, on the CPU in float32.

    Attributes:
        handle: the caller's name for it; unique among the images under way.
        noise: [C, H, W].
        conditioning: per role that the program uses, named tensors without a batch axis; all of the same shapes.
        inputs: what the networks are fed besides, whatever the role: named tensors without a batch axis.
        source, mask: [C, H, W] clean latents; [H, W] in [0, 1], 1 = repaint.
        seed: of the draws of a stochastic program.
        preview_interval: a preview after every so many steps; 0 = none.
        resume: where it stands already; None = at its program's start.
        variant: of the networks; images of different ones share no call.
    """

    handle: Hashable
    program: Program
    noise: Tensor
    conditioning: Mapping[Role, Mapping[str, Tensor]]
    source: Tensor | None = None
    mask: Tensor | None = None
    seed: int = 0
    preview_interval: int = 0
    resume: SlotState | None = None
    variant: Variant = PLAIN
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Images of one layout share a slot table and network calls."""
        return Layout(tuple(self.noise.shape), _shapes(self.conditioning[Role.TARGET]), _shapes(self.inputs))


Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""By name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of a slot table: the latents [C, H, W], each conditioning tensor, and each of the other inputs."""

    latents: tuple[int, ...]
    conditioning: Shapes
    inputs: Shapes = ()


def slot_bytes(layout: Layout) -> int:
    """What a row of a table of this layout takes, in float32."""
    channels, height, width = layout.latents
    conditioning, inputs = (sum(math.prod(shape) for _, shape in one) for one in (layout.conditioning, layout.inputs))
    numbers = (4 * channels + 1) * height * width + len(Role) * conditioning + inputs + MIN_OPS * len(COLUMNS)
    return 4 * numbers


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))


@dataclass(slots=True, eq=False)
class Slot:
    """One image under way: where it is in its program, and which row of its table holds its tensors.

    Attributes:
        first_step: of its first program; previews are counted from there.
        earlier_ops: that it ran in programs which were exchanged since.
    """

    image: Image
    row: int
    first_step: int
    op_index: int = 0
    earlier_ops: int = 0

    @property
    def op(self) -> Op:
        return self.image.program.ops[self.op_index]

    @property
    def terms(self) -> Term:
        """What the next step of this slot needs."""
        terms = self.image.program.terms[self.op_index]
        if self.image.mask is not None:
            terms |= Term.MASK
        return terms | Term.PREVIEW if self.preview_due else terms

    @property
    def finished(self) -> bool:
        return self.op_index == len(self.image.program)

    @property
    def ops_done(self) -> int:
        return self.earlier_ops + self.op_index

    @property
    def ops_in_all(self) -> int:
        return self.earlier_ops + len(self.image.program)

    @property
    def preview_due(self) -> bool:
        """Whether a preview belongs to the op at `op_index`: the last op of every so many steps, but of the image."""
        ops, interval = self.image.program.ops, self.image.preview_interval
        if not interval or self.op_index + 1 == len(ops):
            return False
        step = self.op.step
        return ops[self.op_index + 1].step != step and (step - self.first_step + 1) % interval == 0


class SlotTable:
    """The tensors of all slots of one layout, and of a spare row behind them, which takes what padding computes.

    Args:
        layout: what each row holds.
        capacity: rows.
        device: where the tensors live.
        dtype: float32; float64 in tests of the mathematics.

    Attributes:
        latents, velocity: [capacity + 1, C, H, W]: `x` and `c` of the programs.
        source, noise: [capacity + 1, C, H, W]: `z0` and `n0`.
        mask: [capacity + 1, 1, H, W]; 1 where the image may change.
        conditioning: by name [capacity + 1, len(Role), ...].
        inputs: by name [capacity + 1, ...], for rows of every role.
        programs: [capacity + 1, ops, len(COLUMNS)]: the coefficients, on the device once for the life of a slot.
    """

    def __init__(
        self, layout: Layout, *, capacity: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.layout, self.capacity = layout, capacity
        self._device, self._dtype = device, dtype
        self.latents, self.velocity, self.source, self.noise = (self._zeros(*layout.latents) for _ in range(4))
        self.mask = self._zeros(1, *layout.latents[1:])
        self.conditioning = {name: self._zeros(len(Role), *shape) for name, shape in layout.conditioning}
        self.inputs = {name: self._zeros(*shape) for name, shape in layout.inputs}
        self.programs = self._zeros(MIN_OPS, len(COLUMNS))
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
        done = image.resume.ops_done if image.resume else 0
        slot = self._slots[row] = Slot(image, row, first_step=image.program.ops[0].step, op_index=done)
        return slot

    def state(self, slot: Slot) -> SlotState:
        """A copy of where the slot stands."""
        latents, velocity = (
            table[slot.row].to("cpu", torch.float32, copy=True).numpy() for table in (self.latents, self.velocity)
        )
        return SlotState(latents, velocity, slot.ops_done, slot.ops_in_all)

    def release(self, slot: Slot) -> None:
        del self._slots[slot.row]
        self._free.append(slot.row)

    def check_integrity(self) -> None:
        """Every row is either free or in use, once."""
        rows = sorted([*self._free, *self._slots])
        assert rows == list(range(self.capacity)), f"rows {rows} of {self.capacity}"
        assert all(slot.row == row for row, slot in self._slots.items())

    def exchange(self, slot: Slot, image: Image, *, restart: bool) -> None:
        """Gives a slot another image's program, texts, source and mask; where that fails the slot is as it was.

        Args:
            restart: begin at the image's own start; otherwise the latents stay as they are.
        """
        latents, velocity = self.latents[slot.row].clone(), self.velocity[slot.row].clone()
        try:
            self._write(slot.row, image)
        except BaseException:
            # No more memory, most likely; what was there before has room.
            self._write(slot.row, slot.image)
            self.latents[slot.row], self.velocity[slot.row] = latents, velocity
            raise
        if restart:
            slot.first_step = image.program.ops[0].step
        else:
            self.latents[slot.row] = latents
        slot.image, slot.earlier_ops, slot.op_index = image, slot.ops_done, 0

    def _write(self, row: int, image: Image) -> None:
        source = image.source if image.source is not None else torch.zeros_like(image.noise)
        if image.resume is None:
            start = image.program.start_z * source + image.program.start_n * image.noise
            # The velocity is never another image's: a program may begin with n0 - z0, and 0 * nan is nan.
            velocity = image.noise - source
        else:
            start, velocity = torch.from_numpy(image.resume.latents), torch.from_numpy(image.resume.velocity)
        tables = (self.latents, self.velocity, self.source, self.noise)
        for table, value in zip(tables, (start, velocity, source, image.noise), strict=True):
            table[row].copy_(value, non_blocking=True)
        self.mask[row].fill_(1.0)
        if image.mask is not None:
            self.mask[row, 0].copy_(image.mask, non_blocking=True)
        for role, tensors in image.conditioning.items():
            for name, tensor in tensors.items():
                self.conditioning[name][row, role].copy_(tensor, non_blocking=True)
        for name, tensor in image.inputs.items():
            self.inputs[name][row].copy_(tensor, non_blocking=True)
        self._write_program(row, image.program)

    def _write_program(self, row: int, program: Program) -> None:
        coefficients = torch.from_numpy(program.coefficients).to(self._dtype)
        held = self.programs.shape[1]
        if len(coefficients) > held:
            # Doubled, so that its shape, which compiled steps depend on, changes seldom.
            grown = max(2 * held, len(coefficients)) - held
            self.programs = torch.cat([self.programs, self._zeros(grown, len(COLUMNS))], dim=1)
        self.programs[row, : len(coefficients)].copy_(coefficients, non_blocking=True)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.capacity + 1, *shape, device=self._device, dtype=self._dtype)
