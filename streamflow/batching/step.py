"""One step of a group of slots: the network's input, its guided output, and the affine update of programs.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamflow.backends.base import Network
from streamflow.batching.rows import RowPlan, plan_rows, split_calls
from streamflow.batching.slots import CONDITIONAL, UNCONDITIONAL, Slot, SlotTable
from streamflow.flow.guidance import combine_guidance
from streamflow.flow.noise import drawn_noise
from streamflow.flow.programs import COLUMNS, Op

_COLUMN = {name: index for index, name in enumerate(COLUMNS)}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one network call, or a few, did to a group.

    Attributes:
        preview: the data that each slot expects, [slots, C, H, W].
        rows, padded_rows: network rows that were asked for, and that were run.
    """

    preview: Tensor
    rows: int
    padded_rows: int


@torch.inference_mode()
def run_step(table: SlotTable, slots: Sequence[Slot], network: Network) -> Step:
    """Evaluates the current op of every slot, which all use `network`, and updates their rows of `table`."""
    device = table.latents.device
    ops = [slot.op for slot in slots]
    index = torch.tensor([[slot.row, slot.op_index] for slot in slots]).to(device, non_blocking=True)
    rows = index[:, 0]
    coefficients = table.programs[rows, index[:, 1]]
    group = _Group(table, rows, slots, ops, lambda name: coefficients[:, _COLUMN[name]].view(-1, 1, 1, 1))

    seen = group.network_input()
    plan = plan_rows([op.guided for op in ops])
    timestep = coefficients[:, _COLUMN["timestep"]]
    output, padded = _run_network(network, plan, seen, timestep, table, rows)
    guided = _guide(output, plan, group.coefficient("guidance_scale"))
    group.update(guided)
    return Step(group.coefficient("v_y") * seen + group.coefficient("v_o") * guided, len(plan.positions), padded)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The state of some slots, gathered; `coefficient` gives [slots, 1, 1, 1]."""

    table: SlotTable
    rows: Tensor
    slots: Sequence[Slot]
    ops: Sequence[Op]
    coefficient: Callable[[str], Tensor]

    def network_input(self) -> Tensor:
        """`y`. Terms that no op of the group has are not computed."""
        latents = self.table.latents[self.rows]
        if all(op.plain_input for op in self.ops):
            return latents
        return self._combine(latents, ("i_x", "i_c", "i_z", "i_n"))

    def update(self, output: Tensor) -> None:
        """`x` and `c`, both from the old `c`; then what lies outside a mask is put back."""
        table, rows = self.table, self.rows
        latents = self._combine(table.latents[rows], ("p_x", "p_c", "", "p_n")) + self.coefficient("p_o") * output
        velocity = self.coefficient("g_o") * output
        if any(op.g_c for op in self.ops):
            velocity = velocity + self.coefficient("g_c") * table.velocity[rows]
        if any(slot.image.mask is not None for slot in self.slots):
            latents, velocity = self._keep_unmasked(latents, velocity)
        table.latents[rows] = latents
        table.velocity[rows] = velocity

    def _combine(self, latents: Tensor, names: tuple[str, str, str, str]) -> Tensor:
        on_x, on_c, on_z, on_n = names
        total = self.coefficient(on_x) * latents
        if any(getattr(op, on_c) for op in self.ops):
            total = total + self.coefficient(on_c) * self.table.velocity[self.rows]
        if on_z and any(getattr(op, on_z) for op in self.ops):
            total = total + self.coefficient(on_z) * self.table.source[self.rows]
        if any(getattr(op, on_n) for op in self.ops):
            total = total + self.coefficient(on_n) * self._draws().to(latents)
        return total

    def _draws(self) -> Tensor:
        shape = self.table.layout.latents
        return torch.stack(
            [
                torch.zeros(shape) if op.draw is None else drawn_noise(slot.image.seed, op.draw, shape)
                for slot, op in zip(self.slots, self.ops, strict=True)
            ]
        )

    def _keep_unmasked(self, latents: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        mask, source, noise = (t[self.rows] for t in (self.table.mask, self.table.source, self.table.noise))
        kept = self.coefficient("k_z") * source + self.coefficient("k_n") * noise
        return torch.lerp(kept, latents, mask), torch.lerp(noise - source, velocity, mask)


def _run_network(
    network: Network, plan: RowPlan, seen: Tensor, timestep: Tensor, table: SlotTable, rows: Tensor
) -> tuple[Tensor, int]:
    """The raw output [len(plan.positions), C, H, W], and the rows that were run for it."""
    slots = len(plan.positions) - len(plan.guided)
    outputs, padded_rows = [], 0
    for call in split_calls(len(plan.positions), network.row_counts):
        # Padding repeats a real row: zeros could give nan, which some kernels make slow.
        wanted = list(range(call.start, call.stop)) + [call.start] * (call.padded - (call.stop - call.start))
        roles = [CONDITIONAL if row < slots else UNCONDITIONAL for row in wanted]
        picks = torch.tensor([[plan.positions[row] for row in wanted], roles]).to(seen.device, non_blocking=True)
        position, role = picks[0], picks[1]
        conditioning = {name: values[rows[position], role] for name, values in table.conditioning.items()}
        output = network(seen[position], timestep[position], conditioning)
        outputs.append(output[: call.stop - call.start])
        padded_rows += call.padded
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(seen.dtype), padded_rows


def _guide(output: Tensor, plan: RowPlan, guidance_scale: Tensor) -> Tensor:
    if not plan.guided:
        return output
    slots = len(output) - len(plan.guided)
    conditional, unconditional = output[:slots].clone(), output[slots:]
    guided = torch.tensor(plan.guided).to(output.device, non_blocking=True)
    conditional[guided] = combine_guidance(conditional[guided], unconditional, guidance_scale[guided])
    return conditional
