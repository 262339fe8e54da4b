"""How the denoiser runs here: what its network calls cost, and the rows, slots and steps that follow from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path

import torch

from streamflow.backends.cost import COSTS, Cost, fit, measure, remembered
from streamflow.backends.runtime import DETERMINISTIC_ROWS, available_cores, processor_name
from streamflow.backends.select import ON_CPU
from streamflow.backends.torch_eager import TorchRunner
from streamflow.batching.compiled import CompiledStep, Launch, cuda_graph, one_pool
from streamflow.batching.step import StepFunction, run_step
from streamflow.families.base import Denoiser
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import BASE

LEAST_SLOTS, MOST_SLOTS = 4, 64
"""Between which the number of slots is chosen: few are unfair to those who wait, many take memory."""

_ROWS = (1, 2, 4, 8, 16)
_BUDGET_S = 5.0
_STALE = 0.5


def measured_cost(
    denoiser: Denoiser, device: torch.device, dtype: torch.dtype, *, threads: int = 0, engines: Path | None = None
) -> Cost:
    """Of a call of the base network at the model's default size; measured once on a machine.

    Args:
        threads: of a call; 0 = all cores.
        engines: the folder where it is remembered; None = nowhere.
    """
    card, network = denoiser.card, denoiser.networks[BASE]
    shape = denoiser.latent_shape(card.default_height, card.default_width)
    more = denoiser.row_inputs(card.default_height, card.default_width, Guidance())
    shapes = {**denoiser.conditioning_shapes, **{name: tuple(one.shape) for name, one in more.items()}}

    @cache
    def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(rows, *shape, device=device)

        return zeros(*shape), zeros(), {name: zeros(*one) for name, one in shapes.items()}

    @cache
    def launch(rows: int) -> Launch:
        # As steps are run, see choose_step.
        made = partial(network, *inputs(rows))
        return cuda_graph(made) if device.type == "cuda" else made

    @torch.no_grad()
    def call(rows: int) -> None:
        # To the CPU: only then it has ended.
        output = launch(rows)()
        assert output is not None
        output[0, 0, 0, 0].item()

    cores = torch.get_num_threads() if network.name == TorchRunner.name else threads or available_cores()
    about = (network.name, torch.__version__, processor_name(device), dtype, f"{cores} threads", shape)
    path = None if engines is None else engines / card.weights_revision / COSTS
    key = ", ".join(map(str, about))

    def stale(figures: Sequence[float]) -> bool:
        # Measured while others kept the machine busy, such as stages that start together: a call takes less now.
        return min(_taken(call) for _ in range(3)) < _STALE * Cost(*figures)(1)

    def measured() -> Sequence[float]:
        return astuple(fit(measure(call, _ROWS, repeats=3, budget_s=_BUDGET_S)))

    return Cost(*remembered(path, key, measured, count=2, stale=stale))


def _taken(call: Callable[[int], None]) -> float:
    """Seconds of a call with one row."""
    began_s = time.perf_counter()
    call(1)
    return time.perf_counter() - began_s


def choose_step(denoiser: Denoiser, device: torch.device, *, compiled: bool) -> StepFunction:
    """How a group of slots makes a step: on a GPU in one launch, else call by call, unless it shall be compiled."""
    graphs = device.type == "cuda"
    if not (compiled or graphs):
        return run_step
    if compiled:
        for network in denoiser.networks.values():
            network.name = "torch-compiled"
    return CompiledStep("inductor" if compiled else None, capture=one_pool() if graphs else None)


def pad(denoiser: Denoiser, row_counts: tuple[int, ...]) -> None:
    """Has every network call padded to one of these; networks that were compiled for some keep theirs."""
    for network in denoiser.networks.values():
        network.row_counts = network.row_counts or row_counts


def pad_to_one(denoiser: Denoiser, *, threads: int) -> None:
    """Makes every row's bits the same whatever is beside it, where the networks do not see to that themselves.

    Args:
        threads: between which rows may be shared out; all of them get as many then.
    """
    for network in denoiser.networks.values():
        if not network.row_invariant:
            rows = math.lcm(DETERMINISTIC_ROWS, threads) if network.name in ON_CPU else DETERMINISTIC_ROWS
            network.row_counts = (network.row_counts or (rows,))[-1:]
