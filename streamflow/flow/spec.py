"""What a checkpoint says of its flow, as plain values: the gateway judges requests by them, the denoiser compiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from streamflow.flow.schedules import ScheduleSpec

WindowPrediction = Literal["diff_eps", "ddim_eps", "velocity"]


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """A piecewise rectified flow (PeRFlow, Yan et al.) on a variance-preserving diffusion model.

    Attributes:
        prediction: what the network gives: the noise in one of two parametrisations, or the velocity.
        windows: of time, all equally long.
        beta_start, beta_end: of the "scaled linear" noise schedule with `train_steps` steps.
    """

    prediction: WindowPrediction = "diff_eps"
    windows: int = 4
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000


@dataclass(frozen=True, slots=True)
class RefinerSpec:
    """A velocity refiner (FlowTurbo, Zhao et al.).

    Attributes:
        max_step: the longest step of sigma that it was trained for.
        guided: whether it runs with guidance, a row for each conditioning; else one row refines the guided velocity.
    """

    max_step: float
    guided: bool = False


@dataclass(frozen=True, slots=True)
class FlowSpec:
    """What a checkpoint says of its flow.

    Attributes:
        timestep_scale: the network is fed `timestep_scale * sigma`,
        timestep_rises: or `timestep_scale * (1 - sigma)`.
        velocity_sign: +1 where the network's output is `noise - data`, -1 where it is `data - noise`.
        schedule: of the steps.
        round_up_strength: rectified-flow pipelines (SD3, FLUX) run `ceil(N * strength)` steps, the SD family `floor`.
        evaluates_data: whether the network may be evaluated at sigma 0; where not, a last step that would is Euler's.
        windows: a piecewise flow, which only the sampler `perflow` serves; None = one flow from noise to data.
        refiner: of the checkpoint; None = it has none.
    """

    timestep_scale: float = 1000.0
    timestep_rises: bool = False
    velocity_sign: float = 1.0
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    round_up_strength: bool = False
    evaluates_data: bool = False
    windows: WindowSpec | None = None
    refiner: RefinerSpec | None = None

    def timestep(self, sigma: float) -> float:
        """What the network is fed at `sigma`."""
        return self.timestep_scale * (1 - sigma if self.timestep_rises else sigma)
