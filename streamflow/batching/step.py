"""One step of a group of slots: the network's input, its guided output, and the affine update of programs.py.

`advance` is the whole step on tensors alone, so that it can run as it is or be compiled for one number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from streamflow.backends.base import Network
from streamflow.batching.rows import RowPlan, plan_rows
from streamflow.batching.slots import Slot, SlotTable
from streamflow.flow.noise import drawn_noise
from streamflow.flow.programs import COLUMNS, Term

_COLUMN = {name: index for index, name in enumerate(COLUMNS)}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one network call did to a group of slots.

    Attributes:
        preview: the data that each slot expects, [slots, C, H, W]; None where no slot shows it.
        rows, padded_rows: network rows that were asked for, and that were run.
    """

    preview: Tensor | None
    rows: int
    padded_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Which rows of a slot table a step works on, as indices on the device.

    Attributes:
        slots, ops: per slot its row in the table, and its op, [slots].
        positions, roles: per network row the slot's position in `slots`, and its conditioning, [rows].
        negatives: per slot the network row of its negative output, [slots].
        draws: noise for each slot, [slots, C, H, W]; None where no op uses one.
    """

    slots: Tensor
    ops: Tensor
    positions: Tensor
    roles: Tensor
    negatives: Tensor
    draws: Tensor | None

    def copy_(self, other: Selection) -> None:
        """Takes over the values of another one of the same sizes."""
        for name in ("slots", "ops", "positions", "roles", "negatives", "draws"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.copy_(theirs, non_blocking=True)


StepFunction = Callable[[SlotTable, Sequence[Slot], Network], Step]


@torch.inference_mode()
def run_step(table: SlotTable, slots: Sequence[Slot], network: Network) -> Step:
    """Evaluates the current op of every slot, all of which fit into one call of `network`, and updates their rows."""
    plan = plan_rows([slot.op for slot in slots], network.row_counts)
    terms = group_terms(slots)
    preview = advance(network, table, select(table, slots, plan, terms), terms)
    return Step(preview, plan.count, len(plan.positions))


def group_terms(slots: Sequence[Slot]) -> Term:
    """The terms that any slot of the group has; the others are not computed."""
    return reduce(or_, (slot.terms for slot in slots))


def select(table: SlotTable, slots: Sequence[Slot], plan: RowPlan, terms: Term, *, padded_slots: int = 0) -> Selection:
    """The indices of a step, in one copy to the device.

    Args:
        padded_slots: fill up to so many slots with the table's spare row.
    """
    spare = max(0, padded_slots - len(slots))
    numbers = [*(slot.row for slot in slots), *[table.capacity] * spare]
    numbers += [*(slot.op_index for slot in slots), *[0] * spare]
    numbers += [*plan.positions, *plan.roles, *plan.negatives, *[0] * spare]
    count, rows = len(slots) + spare, len(plan.positions)
    device = table.latents.device
    index = torch.tensor(numbers).to(device, non_blocking=True)
    chosen, ops, positions, roles, negatives = torch.split(index, [count, count, rows, rows, count])
    draws = _draws(slots, spare, table.layout.latents).to(device, non_blocking=True) if Term.DRAW in terms else None
    return Selection(chosen, ops, positions, roles, negatives, draws)


def spare_selection(table: SlotTable, rows: int, terms: Term) -> Selection:
    """A step of so many rows in which nothing happens but on the table's spare row."""
    device = table.latents.device
    spare = torch.full((rows,), table.capacity, device=device)
    numbers, zeros = torch.arange(rows, device=device), torch.zeros_like(spare)
    draws = torch.zeros(rows, *table.layout.latents, device=device) if Term.DRAW in terms else None
    return Selection(spare, zeros, numbers, zeros.clone(), numbers.clone(), draws)


def advance(network: Network, table: SlotTable, selection: Selection, terms: Term) -> Tensor | None:
    """Runs one op of the selected slots and writes their new state into the table; the preview where `terms` has it."""
    state = _State(table, selection, terms)
    seen = state.network_input()
    output = state.guide(state.call(network, seen), network.guided_channels)
    preview = state.preview(seen, output) if Term.PREVIEW in terms else None
    state.update(output)
    return preview


class _State:
    """The state of some slots, gathered."""

    def __init__(self, table: SlotTable, selection: Selection, terms: Term) -> None:
        self._table, self._selection, self._terms = table, selection, terms
        self._coefficients = table.programs[selection.slots, selection.ops]
        self._latents, self._velocity = table.latents[selection.slots], table.velocity[selection.slots]

    def network_input(self) -> Tensor:
        """`y`, [slots, C, H, W]."""
        if Term.INPUT not in self._terms:
            return self._latents
        return self._sum(self._coefficient("i_x") * self._latents, c="i_c", z="i_z", n="i_n")

    def call(self, network: Network, seen: Tensor) -> Tensor:
        """The network's output, [rows, C, H, W]."""
        selection, timestep = self._selection, self._coefficients[:, _COLUMN["timestep"]]
        if network.takes_velocity:
            seen = torch.cat([seen, self._velocity], dim=1)
        slots = selection.slots
        if Term.GUIDED in self._terms or len(selection.positions) != len(slots):
            seen, timestep = seen[selection.positions], timestep[selection.positions]
            slots = slots[selection.positions]
        fed = {name: values[slots, selection.roles] for name, values in self._table.conditioning.items()}
        fed |= {name: values[slots] for name, values in self._table.inputs.items()}
        return network(seen, timestep, fed).to(self._latents.dtype)

    def guide(self, output: Tensor, channels: int | None = None) -> Tensor:
        """`o_n + g (o_c - o_n)`, [slots, C, H, W]; exactly `o_c` where both are the same row.

        Args:
            channels: see Network.guided_channels.
        """
        conditional = output[: len(self._selection.slots)]
        if Term.GUIDED not in self._terms:
            return conditional
        negative = output[self._selection.negatives]
        guided = negative + self._coefficient("guidance_scale") * (conditional - negative)
        return guided if channels is None else torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def preview(self, seen: Tensor, output: Tensor) -> Tensor:
        shown = self._coefficient("v_y") * seen + self._coefficient("v_o") * output
        return self._sum(shown, c="v_c")

    def update(self, output: Tensor) -> None:
        """`x` and `c`, both from the old `c`; then what lies outside a mask is put back."""
        moved = self._coefficient("p_x") * self._latents + self._coefficient("p_o") * output
        latents = self._sum(moved, c="p_c", z="p_z", n="p_n")
        velocity = self._sum(self._coefficient("g_o") * output, c="g_c")
        if Term.MASK in self._terms:
            latents, velocity = self._keep_unmasked(latents, velocity)
        self._table.latents[self._selection.slots] = latents
        self._table.velocity[self._selection.slots] = velocity

    def _keep_unmasked(self, latents: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        table, slots = self._table, self._selection.slots
        mask, source, noise = table.mask[slots], table.source[slots], table.noise[slots]
        kept = self._coefficient("k_z") * source + self._coefficient("k_n") * noise
        moving = 1 + self._coefficient("k_c") * (mask - 1)
        return torch.lerp(kept, latents, mask), torch.lerp(noise - source, velocity, moving)

    def _sum(self, total: Tensor, *, c: str = "", z: str = "", n: str = "") -> Tensor:
        """Adds the terms whose coefficients have these names."""
        if c and Term.VELOCITY in self._terms:
            total = total + self._coefficient(c) * self._velocity
        if z and Term.SOURCE in self._terms:
            total = total + self._coefficient(z) * self._table.source[self._selection.slots]
        if n and self._selection.draws is not None:
            total = total + self._coefficient(n) * self._selection.draws
        return total

    def _coefficient(self, name: str) -> Tensor:
        return self._coefficients[:, _COLUMN[name]].view(-1, 1, 1, 1)


def _draws(slots: Sequence[Slot], spare: int, shape: tuple[int, ...]) -> Tensor:
    zeros = torch.zeros(shape)
    drawn = [zeros if slot.op.draw is None else drawn_noise(slot.image.seed, slot.op.draw, shape) for slot in slots]
    return torch.stack([*drawn, *[zeros] * spare])
