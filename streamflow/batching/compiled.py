"""Sample-aware compilation: a step as one compiled callable for each number of rows (FlowTurbo, section 3.4).

Network, guidance and the affine update are one graph, with nothing between them for Python or the device to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamflow.backends.base import Network
from streamflow.batching.rows import plan_rows
from streamflow.batching.slots import Layout, Slot, SlotTable
from streamflow.batching.step import Selection, Step, advance, group_terms, select
from streamflow.flow.programs import Term

Compiled = Callable[[Selection], Tensor | None]

_USUAL = Term.INPUT | Term.VELOCITY | Term.GUIDED | Term.PREVIEW
_ALL = _USUAL | Term.SOURCE | Term.DRAW | Term.MASK


class CompiledStep:
    """Stands in for `run_step`; a callable is compiled when its rows, layout and terms first occur, which takes long.

    A group's terms are rounded up to one of two sets, so that there are few callables.

    Args:
        compiler: of torch.compile: "inductor", or "eager" to run the captured graph as it is.
    """

    def __init__(self, compiler: str = "inductor") -> None:
        self._compiler = compiler
        self._callables: dict[tuple[int, int, Layout, Term], tuple[SlotTable, Compiled]] = {}

    def __call__(self, table: SlotTable, slots: Sequence[Slot], network: Network) -> Step:
        plan = plan_rows([slot.op for slot in slots], network.row_counts)
        wanted = group_terms(slots)
        terms = _USUAL if wanted in _USUAL else _ALL
        rows = len(plan.positions)
        # Inference mode and the compiler do not go together.
        with torch.no_grad():
            selection = select(table, slots, plan, terms, padded_slots=rows)
            preview = self._compiled(network, rows, table, terms)(selection)
        return Step(preview if Term.PREVIEW in wanted else None, plan.count, rows)

    def _compiled(self, network: Network, rows: int, table: SlotTable, terms: Term) -> Compiled:
        key = (id(network), rows, table.layout, terms)
        held = self._callables.get(key)
        # A layout's table is made anew after its images were gone for long.
        if held is None or held[0] is not table:

            def whole_step(selection: Selection) -> Tensor | None:
                return advance(network, table, selection, terms)

            compiled = torch.compile(whole_step, backend=self._compiler, dynamic=False, fullgraph=True)
            held = self._callables[key] = table, compiled
        return held[1]
