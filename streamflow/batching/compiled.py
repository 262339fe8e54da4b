"""Sample-aware compilation: a step as one compiled callable for each number of rows (FlowTurbo, section 3.4).

Network, guidance and the affine update are one graph, with nothing between them for Python or the device to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from streamflow.backends.base import Network
from streamflow.batching.rows import plan_rows
from streamflow.batching.slots import Slot, SlotTable
from streamflow.batching.step import Selection, Step, advance, group_terms, select
from streamflow.flow.programs import Term

Compiled = Callable[[SlotTable, Selection], Tensor | None]

_USUAL = Term.INPUT | Term.VELOCITY | Term.GUIDED | Term.PREVIEW
_ALL = _USUAL | Term.SOURCE | Term.DRAW | Term.MASK


class CompiledStep:
    """Stands in for `run_step`; a callable is compiled when its rows, table and terms first occur, which takes long.

    A group's terms are rounded up to one of two sets, so that there are few callables.

    Args:
        compiler: of torch.compile: "inductor", or "eager" to run the captured graph as it is.
    """

    def __init__(self, compiler: str = "inductor") -> None:
        self._compiler = compiler
        # They go with their tables, of which the engine drops some: a callable must not hold its table.
        self._callables: WeakKeyDictionary[SlotTable, dict[tuple[int, int, int, Term], Compiled]] = WeakKeyDictionary()

    def __call__(self, table: SlotTable, slots: Sequence[Slot], network: Network) -> Step:
        plan = plan_rows([slot.op for slot in slots], network.row_counts)
        wanted = group_terms(slots)
        terms = _USUAL if wanted in _USUAL else _ALL
        rows = len(plan.positions)
        # Inference mode and the compiler do not go together.
        with torch.no_grad():
            selection = select(table, slots, plan, terms, padded_slots=rows)
            preview = self._compiled(network, rows, table, terms)(table, selection)
        return Step(preview if Term.PREVIEW in wanted else None, plan.count, rows)

    def _compiled(self, network: Network, rows: int, table: SlotTable, terms: Term) -> Compiled:
        callables = self._callables.setdefault(table, {})
        key = (id(network), rows, table.programs.shape[1], terms)
        if key not in callables:

            def whole_step(table: SlotTable, selection: Selection) -> Tensor | None:
                return advance(network, table, selection, terms)

            own = _with_its_own_code(whole_step)
            callables[key] = torch.compile(own, backend=self._compiler, dynamic=False, fullgraph=True)
        return callables[key]


def _with_its_own_code(function: Compiled) -> Compiled:
    """torch keeps what it compiled by code object, only a few for each, and closures of one function share theirs."""
    assert isinstance(function, FunctionType)
    code, names = function.__code__.replace(), function.__globals__
    return FunctionType(code, names, function.__name__, closure=function.__closure__)
