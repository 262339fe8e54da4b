"""Phase `refiner`: small networks that predict how the velocity changes over a step (FlowTurbo, section 3.2).

With the velocity v at (x, sigma) and a step of length d towards the data, x' = x - d v, the refiner learns

    r(x', v, sigma - d) = v'(x', sigma - d) - v

so that `v + r` stands in for an evaluation of the UNet. Both velocities are the guided ones, for one scale of guidance
or none in every example: one row of the refiner does what takes the UNet two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from training.figures import gate, record_figures
from training.loop import LoopConfig, TrainingLoop
from training.networks import new_refiner
from training.pairs import load_pairs
from training.parts import STATE_DIR, device, half_copy, load_text, load_unet, write_part
from training.pool import embed_all, open_pool
from training.text import tokenize

MAX_STEP = 0.25
CONFIG = LoopConfig(steps=1500, batch=32, learning_rate=2e-3, ema_decay=0.998)
_MEASURED_BATCHES = 20

Batches = Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""From a generator to data and noise [B, 4, 16, 16] and embeddings [B, 32, 128]."""


@dataclass(frozen=True)
class Refined:
    """A UNet that gets a refiner.

    Attributes:
        refiner: the refiner's folder.
        guidance_scales: that its examples have, each as often.
        gate: the least share of the change that it explains. Reflow leaves little change, and that without much order.
    """

    unet: str
    refiner: str
    guidance_scales: tuple[float, ...]
    gate: float


REFINED = (
    Refined("unet_base", "unet_base_refiner", (1.0, 2.0), gate=0.5),
    Refined("unet", "unet_refiner", (1.0, 1.5), gate=0.25),
)


@dataclass(frozen=True)
class Example:
    """Inputs and targets of the refiner: x' and v side by side [B, 8, 16, 16], sigma - d [B], v' - v [B, 4, 16, 16]."""

    seen: Tensor
    sigmas: Tensor
    embeddings: Tensor
    change: Tensor


class Examples:
    """Makes examples with a finished UNet."""

    def __init__(self, refined: Refined, batches: Batches, empty: Tensor) -> None:
        self._unet = load_unet(refined.unet).eval().requires_grad_(False)
        self._scales, self._batches, self._empty = refined.guidance_scales, batches, empty

    @torch.no_grad()
    def make(self, generator: torch.Generator) -> Example:
        data, noise, embeddings = self._batches(generator)
        count = len(data)
        sigmas = torch.rand(count, generator=generator).to(data)
        steps = (torch.rand(count, generator=generator) * MAX_STEP).to(data).minimum(sigmas)
        # A block of rows for each scale: the unguided ones need no second row.
        scales = torch.tensor(self._scales).repeat_interleave(-(-count // len(self._scales)))[:count].to(data)
        latents = torch.lerp(data, noise, _wide(sigmas))
        velocity = self._velocity(latents, sigmas, embeddings, scales)
        ahead = latents - _wide(steps) * velocity
        after = self._velocity(ahead, sigmas - steps, embeddings, scales)
        return Example(torch.cat([ahead, velocity], dim=1), sigmas - steps, embeddings, after - velocity)

    def _velocity(self, latents: Tensor, sigmas: Tensor, embeddings: Tensor, scales: Tensor) -> Tensor:
        guided = scales > 1
        told = self._evaluate(latents, sigmas, embeddings)
        unguided = self._evaluate(latents[guided], sigmas[guided], self._empty.expand(int(guided.sum()), -1, -1))
        told[guided] = unguided + _wide(scales[guided]) * (told[guided] - unguided)
        return told

    def _evaluate(self, latents: Tensor, sigmas: Tensor, embeddings: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, dtype=torch.bfloat16):
            return self._unet(latents, 1000 * sigmas, embeddings).sample.float()


def refine(refiner: UNet2DConditionModel, example: Example) -> Tensor:
    """The predicted change of velocity [B, 4, 16, 16]."""
    return refiner(example.seen, 1000 * example.sigmas, example.embeddings).sample


def train(refined: Refined) -> tuple[UNet2DConditionModel, float]:
    """Trains from the saved state where there is one; the average, and the share of the change that it explains."""
    torch.manual_seed(CONFIG.seed)
    refiner = new_refiner(max_step=MAX_STEP).to(device())
    examples = Examples(refined, _batches(refined), _empty_embedding())
    loop = TrainingLoop(refined.refiner, refiner, CONFIG, state_file=STATE_DIR / f"{refined.refiner}.safetensors")

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        example = examples.make(generator)
        return F.mse_loss(refine(refiner, example), example.change)

    loop.run(loss_of)
    average = loop.averaged_copy()
    return average, explained(average, examples)


@torch.no_grad()
def explained(refiner: UNet2DConditionModel, examples: Examples) -> float:
    """1 - the squared error over the squared change, on new examples; reusing the old velocity has 0."""
    generator = torch.Generator().manual_seed(-1)
    error, change = 0.0, 0.0
    for _ in range(_MEASURED_BATCHES):
        example = examples.make(generator)
        error += float((refine(refiner, example) - example.change).square().sum())
        change += float(example.change.square().sum())
    return round(1 - error / change, 4)


def run() -> None:
    """Trains and writes both refiners and checks the gate."""
    figures = {}
    for refined in REFINED:
        refiner, share = train(refined)
        write_part(half_copy(refiner), refined.refiner)
        gate(refined.refiner, "share of the change of velocity explained", share, refined.gate)
        figures[refined.refiner] = {"explained": share, "parameters": refiner.num_parameters()}
    record_figures("refiner", figures)


def _batches(refined: Refined) -> Batches:
    """The base was trained on drawings and any noise, the reflowed UNet on pairs: each sees points of its own flow."""
    if refined.unet == "unet_base":
        pool = open_pool()

        def drawings(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
            rows = torch.randint(len(pool.latents), (CONFIG.batch,), generator=generator)
            variants = torch.randint(pool.embeddings.shape[1], (CONFIG.batch,), generator=generator)
            data, embeddings = pool.batch(rows, variants)
            return data, torch.randn(data.shape, generator=generator).to(data), embeddings

        return drawings
    stored = load_pairs()
    told = embed_all(load_text()[1], stored["tokens"])

    def pairs(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(told), (CONFIG.batch,), generator=generator)
        data, noise, embeddings = (
            values[rows].float().to(device()) for values in (stored["data"], stored["noise"], told)
        )
        return data, noise, embeddings

    return pairs


def _empty_embedding() -> Tensor:
    tokenizer, encoder = load_text()
    return embed_all(encoder, tokenize(tokenizer, [""])).float().to(device())


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
