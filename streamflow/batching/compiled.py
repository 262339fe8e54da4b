"""Sample-aware compilation: a step as one callable for each number of rows (FlowTurbo, section 3.4).

Network, guidance and the affine update are one graph, with nothing between them for Python or the device to wait for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from streamflow.backends.base import Network
from streamflow.batching.rows import plan_rows
from streamflow.batching.slots import Slot, SlotTable
from streamflow.batching.step import Selection, Step, advance, group_terms, select, spare_selection
from streamflow.flow.programs import Term

WholeStep = Callable[[SlotTable, Selection], Tensor | None]
Launch = Callable[[], Tensor | None]
Capture = Callable[[Launch], Launch]
"""From a function whose tensors stay where they are to one that does the same, faster."""

_USUAL = Term.INPUT | Term.VELOCITY | Term.GUIDED | Term.PREVIEW
_ALL = _USUAL | Term.SOURCE | Term.DRAW | Term.MASK


class CompiledStep:
    """Stands in for `run_step`; a callable is made when its rows, table and terms first occur, which takes long.

    A group's terms are rounded up to one of two sets, so that there are few callables.

    Args:
        compiler: of torch.compile: "inductor", or "eager" to run the traced graph as it is; None = not compiled.
        capture: how a callable is kept, such as `cuda_graph`; None = it is called as it is.
    """

    def __init__(self, compiler: str | None = "inductor", *, capture: Capture | None = None) -> None:
        self._compiler, self._capture = compiler, capture
        # They go with their tables, of which the engine drops some: a callable must not hold its table.
        self._callables: WeakKeyDictionary[SlotTable, dict[tuple[int, int, int, Term], WholeStep]] = WeakKeyDictionary()

    def __call__(self, table: SlotTable, slots: Sequence[Slot], network: Network) -> Step:
        plan = plan_rows([slot.op for slot in slots], network.row_counts)
        wanted = group_terms(slots)
        terms = _USUAL if wanted in _USUAL else _ALL
        rows = len(plan.positions)
        device = table.latents.device
        # Streams and graphs are those of the thread's own device. Inference mode and the compiler do not go together.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.no_grad():
            selection = select(table, slots, plan, terms, padded_slots=rows)
            preview = self._callable(network, rows, table, terms)(table, selection)
        return Step(preview if Term.PREVIEW in wanted else None, plan.count, rows)

    def forget(self, network: Network) -> None:
        """Drops what was made for a network that is not used any more."""
        for callables in self._callables.values():
            for key in [key for key in callables if key[0] == id(network)]:
                del callables[key]

    def seal(self) -> None:
        """What is met for the first time from now on is not compiled: images under way would wait for a minute."""
        self._compiler = None

    def _callable(self, network: Network, rows: int, table: SlotTable, terms: Term) -> WholeStep:
        callables = self._callables.setdefault(table, {})
        key = (id(network), rows, table.programs.shape[1], terms)
        if key not in callables:

            def whole_step(table: SlotTable, selection: Selection) -> Tensor | None:
                return advance(network, table, selection, terms)

            made: WholeStep = whole_step
            if self._compiler is not None:
                own = _with_its_own_code(whole_step)
                made = torch.compile(own, backend=self._compiler, dynamic=False, fullgraph=True)
            if self._capture is not None:
                made = _captured(made, table, spare_selection(table, rows, terms), self._capture)
            callables[key] = made
        return callables[key]


def one_pool() -> Capture:
    """Captures that share their memory: they are replayed one after another, and what comes out is copied."""
    return partial(cuda_graph, pool=torch.cuda.graph_pool_handle())


def cuda_graph(launch: Launch, *, pool: Any = None) -> Launch:
    """One launch in place of one for every kernel. Args: pool: see torch.cuda.graph."""
    # Outside of the capture first: what is called for the first time allocates, and may choose its kernels.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = launch()

    def replay() -> Tensor | None:
        graph.replay()
        # The next replay writes to the same place.
        return None if output is None else output.clone()

    return replay


def _captured(whole_step: WholeStep, table: SlotTable, selection: Selection, capture: Capture) -> WholeStep:
    """Args: selection: of the spare row, on which the capture runs; later ones are copied into its tensors."""
    alive = weakref.ref(table)

    def launch() -> Tensor | None:
        held = alive()
        assert held is not None, "a callable is used with its own table only"
        return whole_step(held, selection)

    kept = capture(launch)

    def step(_: SlotTable, chosen: Selection) -> Tensor | None:
        selection.copy_(chosen)
        return kept()

    return step


def _with_its_own_code(function: WholeStep) -> WholeStep:
    """torch keeps what it compiled by code object, only a few for each, and closures of one function share theirs."""
    assert isinstance(function, FunctionType)
    code, names = function.__code__.replace(), function.__globals__
    return FunctionType(code, names, function.__name__, closure=function.__closure__)
