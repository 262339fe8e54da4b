"""A part as the running batch sees it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from streamflow.backends.parts import Runner


class PartNetwork:
    """Implements `base.Network` with a runner whose inputs are `latents`, `timestep` and the conditioning.

    Args:
        takes_velocity, guided_channels: see Network.
    """

    def __init__(self, runner: Runner, *, takes_velocity: bool = False, guided_channels: int | None = None) -> None:
        self._runner = runner
        self.name, self.row_invariant = runner.name, runner.row_invariant
        self.row_counts, self.takes_velocity = runner.row_counts, takes_velocity
        self.guided_channels = guided_channels

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        return self._runner({"latents": latents, "timestep": timestep, **conditioning})

    @property
    def runner(self) -> Runner:
        return self._runner

    def using(self, runner: Runner) -> PartNetwork:
        """As it is, with another runner."""
        other = PartNetwork(runner, takes_velocity=self.takes_velocity, guided_channels=self.guided_channels)
        other.name, other.row_invariant, other.row_counts = self.name, self.row_invariant, self.row_counts
        return other

    def __repr__(self) -> str:
        return f"PartNetwork({self._runner!r}, row_counts={self.row_counts})"
