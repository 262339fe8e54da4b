"""A part as the running batch sees it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from streamflow.backends.parts import Runner


class PartNetwork:
    """Implements `base.Network` with a runner whose inputs are `latents`, `timestep` and the conditioning.

    Args:
        row_counts: pad every call to one of these; None = any. One count alone makes the output independent of how
            many rows are asked for, where the runner itself is not row-invariant.
        takes_velocity: see Network.
    """

    def __init__(
        self, runner: Runner, *, row_counts: tuple[int, ...] | None = None, takes_velocity: bool = False
    ) -> None:
        self._runner = runner
        self.name, self.row_invariant = runner.name, runner.row_invariant
        self.row_counts, self.takes_velocity = row_counts, takes_velocity

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        return self._runner({"latents": latents, "timestep": timestep, **conditioning})

    def __repr__(self) -> str:
        return f"PartNetwork({self._runner!r}, row_counts={self.row_counts})"
