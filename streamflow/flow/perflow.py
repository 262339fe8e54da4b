"""PeRFlow: time is cut into windows, and within each the flow is straight (Yan et al., "PeRFlow").

Time t runs from 1 (noise) to 0. In the window from s down to e, with the noise schedule's `abar` at both ends,

    gamma = sqrt(abar_s / abar_e),  lam = 1 / gamma
    eta   = -sqrt(1 - gamma^2) / gamma                                    prediction diff_eps
            sqrt(1 - abar_e) - sqrt(abar_e / abar_s (1 - abar_s))         prediction ddim_eps
    D = lam (t - s) + (e - t);  lam_t = lam (e - s) / D;  eta_t = eta (e - t) / D
    x_e = lam_t x + eta_t eps                                             where the window will end
    x'  = x + (t' - t) (x_e - x) / (e - t)

so a step is `x' = A x + B eps`, one op. A network that predicts the velocity needs no window: `x' = x + (t' - t) u`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Op
from streamflow.flow.spec import FlowSpec, WindowSpec

# As the published scheduler looks windows up: a time within this of a window's end belongs to the next one.
_PRECISION = 1e-4


@dataclass(frozen=True)
class Windows:
    """The windows of one piecewise flow.

    Attributes:
        spec: prediction, number of windows and noise schedule; None = a rectified flow, whose noising is straight.
        count: of windows.
    """

    spec: WindowSpec | None
    count: int
    edges: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple((self.count - k) / self.count for k in range(self.count + 1)))

    def around(self, t: float) -> tuple[float, float]:
        """Start and end of the window of t; a boundary belongs to the window that starts there."""
        return next((s, e) for s, e in zip(self.edges, self.edges[1:], strict=False) if t - _PRECISION > e)

    def times(self, steps: int, *, exact: bool) -> list[float]:
        """Where the network is evaluated: the steps are dealt to the windows, the first ones take what is left over.

        Args:
            exact: as they are; otherwise cut to whole thousandths, as the published scheduler does.
        """
        times = []
        for k, (start, end) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            count = steps // self.count + (k < steps % self.count)
            times += np.linspace(start, end, num=count, endpoint=False).tolist()
        return times if exact else [int(time * 1000) / 1000 for time in times]

    def max_steps(self, *, exact: bool) -> int:
        """With more, two times could be one, or the last one nothing."""
        finest = round(1 / _PRECISION) if exact else 1000
        return (finest - 1) // self.count * self.count

    def abar(self, t: float) -> float:
        """The noise schedule's cumulative alpha at a window's boundary."""
        assert self.spec is not None
        return float(_cumulative_alphas(self.spec)[max(int(self.spec.train_steps * t - 1), 0)])

    def noising(self, t: float) -> tuple[float, float]:
        """Factors of data and noise at t: straight between the ends of the window."""
        if self.spec is None:
            return 1 - t, t
        if t <= 0:
            return _ends(self.abar(0.0))
        start, end = self.around(t)
        share = (t - end) / (start - end)
        pairs = zip(_ends(self.abar(start)), _ends(self.abar(end)), strict=True)
        data, noise = (share * at_start + (1 - share) * at_end for at_start, at_end in pairs)
        return data, noise

    def ends(self, t: float) -> tuple[float, float, float, float]:
        """`lam_t`, `eta_t` of the window of t, its end, and `abar` there."""
        assert self.spec is not None
        start, end = self.around(t)
        abar_s, abar_e = self.abar(start), self.abar(end)
        gamma = math.sqrt(abar_s / abar_e)
        lam = 1 / gamma
        if self.spec.prediction == "diff_eps":
            eta = -math.sqrt(1 - gamma**2) / gamma
        else:
            eta = math.sqrt(1 - abar_e) - math.sqrt(abar_e / abar_s * (1 - abar_s))
        divisor = lam * (t - start) + (end - t)
        return lam * (end - start) / divisor, eta * (end - t) / divisor, end, abar_e


def perflow(windows: Windows, times: list[float], flow: FlowSpec, guidance: Guidance, *, first: int) -> list[Op]:
    """The ops of the steps from `first` on.

    Args:
        times: from `Windows.times`.
    """
    ops, sign = [], flow.velocity_sign
    step: dict[str, Any]
    for index, (t, after) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        data, noise = windows.noising(after)
        if windows.spec is None or windows.spec.prediction == "velocity":
            step = {"p_o": sign * (after - t), "g_o": sign, "v_o": -sign * t}
        else:
            step = _noise_step(windows, t, after)
        op = Op(
            name="W",
            step=index,
            sigma=after,
            timestep=flow.timestep(t),
            guidance_scale=guidance.at(t),
            k_z=data,
            k_n=noise,
            **step,
        )
        ops.append(op)
    return ops[first:]


def _noise_step(windows: Windows, t: float, after: float) -> dict[str, Any]:
    lam_t, eta_t, end, abar_e = windows.ends(t)
    share = (after - t) / (end - t)
    # The data behind the window's end, were the predicted noise the same there.
    root = math.sqrt(abar_e)
    return {
        "p_x": 1 + share * (lam_t - 1),
        "p_o": share * eta_t,
        "v_y": lam_t / root,
        "v_o": (eta_t - math.sqrt(1 - abar_e)) / root,
    }


def _ends(abar: float) -> tuple[float, float]:
    return math.sqrt(abar), math.sqrt(1 - abar)


@lru_cache(maxsize=8)
def _cumulative_alphas(spec: WindowSpec) -> np.ndarray:
    """float64 [train_steps], from betas in float32 as the published scheduler has them."""
    roots = np.linspace(math.sqrt(spec.beta_start), math.sqrt(spec.beta_end), spec.train_steps, dtype=np.float32)
    return np.cumprod(1 - roots**2, dtype=np.float64)
