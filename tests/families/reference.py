"""The oracle: diffusers' own pipelines on the same checkpoint, with the published steps where diffusers has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ConfigMixin,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

CPU = torch.device("cpu")


class SequentialFlow(FlowMatchEulerDiscreteScheduler):
    """The pipeline scales its noise by this, which the flow scheduler lacks."""

    init_noise_sigma = 1.0


class InstaFlow(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """N Euler steps at T = 1000 (1 - i / N) with an output that is data - noise, as InstaFlow's pipeline makes them."""

    order, init_noise_sigma = 1, 1.0

    @register_to_config
    def __init__(self) -> None:
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, steps: int, device: object = None) -> None:
        self.timesteps = torch.tensor([(1 - i / steps) * 1000.0 for i in range(steps)])

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        return sample

    def step(self, output: Tensor, timestep: object, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (sample + output / len(self.timesteps),)


class PeRFlow(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Four windows, stepped through with predicted ends of windows (Yan et al.); integer times, as published."""

    order, init_noise_sigma = 1, 1.0

    @register_to_config
    def __init__(self, prediction: str = "diff_eps") -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.alphas = torch.cumprod(1 - betas, dim=0).double()
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, steps: int, device: object = None) -> None:
        times: list[float] = []
        for window in range(4):
            count = steps // 4 + (window < steps % 4)
            start, end = 1 - window / 4, 1 - (window + 1) / 4
            times += [start + (end - start) * k / count for k in range(count)]
        self.timesteps = torch.tensor([int(1000 * t) for t in times])

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        return sample

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        index = int((self.timesteps == timestep).nonzero()[0])
        t = self.timesteps[index].item() / 1000
        after = self.timesteps[index + 1].item() / 1000 if index + 1 < len(self.timesteps) else 0.0
        window = next(k for k in range(4) if t - 1e-4 > 1 - (k + 1) / 4)
        s, e = 1 - window / 4, 1 - (window + 1) / 4
        end = self._end(sample.double(), output.double(), t, s, e)
        return ((sample + (after - t) * (end - sample) / (e - t)).float(),)

    def _end(self, x: Tensor, eps: Tensor, t: float, s: float, e: float) -> Tensor:
        """Where the window ends, by the predicted noise; or the velocity, as in the weights for SD 2.1."""
        if self.config.prediction == "velocity":
            return x + (e - t) * eps
        at_s, at_e = self.alphas[max(int(1000 * s - 1), 0)], self.alphas[max(int(1000 * e - 1), 0)]
        gamma = (at_s / at_e).sqrt()
        if self.config.prediction == "diff_eps":
            eta = -((1 - gamma**2).sqrt()) / gamma
        else:
            eta = (1 - at_e).sqrt() - (at_e / at_s * (1 - at_s)).sqrt()
        lam_s = 1 / gamma
        divisor = lam_s * (t - s) + (e - t)
        return lam_s * (e - s) / divisor * x + eta * (e - t) / divisor * eps


def load_sd(folder: Path, scheduler: Any = None) -> StableDiffusionPipeline:
    """Args: scheduler: None = the flow-matching one; it runs our schedule when called with `sigmas`."""
    scheduler = scheduler or SequentialFlow.from_pretrained(folder / "scheduler")
    return _quiet(StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler, dtype=torch.float32))


def load_sdxl(folder: Path, scheduler: Any) -> StableDiffusionXLPipeline:
    return _quiet(StableDiffusionXLPipeline.from_pretrained(folder, scheduler=scheduler, dtype=torch.float32))


def load_sd3(folder: Path) -> StableDiffusion3Pipeline:
    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    return _quiet(StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **absent))


def load_flux(folder: Path) -> FluxPipeline:
    return _quiet(FluxPipeline.from_pretrained(folder, dtype=torch.float32))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
