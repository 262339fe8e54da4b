"""The loop that every phase shares: one-cycle AdamW, EMA, progress, and a state file from which it resumes exactly."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

console = Console()
LossFunction = Callable[[int, torch.Generator], Tensor]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train; times in seconds."""

    steps: int
    batch: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every_s: float = 120.0


def one_cycle(step: int, config: LoopConfig) -> float:
    """Learning rate at `step`: a linear rise over the warm-up, then half a cosine down to a hundredth."""
    rise = max(1, round(config.steps * config.warmup))
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    done = min(1.0, (step - rise) / max(1, config.steps - rise))
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class TrainingLoop(Generic[Module]):
    """Trains `model` in place. `average` holds the EMA of its parameters, in their order.

    Step k draws from a generator seeded by (seed, k) only, so a run that was stopped and resumed equals one that
    was not.
    """

    def __init__(self, name: str, model: Module, config: LoopConfig, *, state_file: Path) -> None:
        self.name, self.model, self.config, self.state_file = name, model, config, state_file
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, foreach=True
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        if state_file.exists():
            self._restore()

    def run(
        self,
        loss_of: LossFunction,
        *,
        until: int | None = None,
        on_save: Callable[[], None] | None = None,
    ) -> None:
        """Takes steps up to `until` (default: all), saving state now and then; `on_save` runs after each save."""
        end = min(self.config.steps, until if until is not None else self.config.steps)
        saved_at = time.monotonic()
        with progress(self.name, total=end, done=self.step, per_step=self.config.batch) as advance:
            while self.step < end:
                advance(self._take_step(loss_of))
                if time.monotonic() - saved_at > self.config.save_every_s or self.step == end:
                    self.save()
                    if on_save is not None:
                        on_save()
                    saved_at = time.monotonic()

    def _take_step(self, loss_of: LossFunction) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = one_cycle(self.step, self.config)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        loss = loss_of(self.step, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return float(loss.detach())

    @contextmanager
    def averaged(self) -> Iterator[Module]:
        """The model with its EMA weights inside the block."""
        current = [p.detach().clone() for p in self.parameters]
        self._assign(self.average)
        try:
            yield self.model
        finally:
            self._assign(current)

    def averaged_copy(self) -> Module:
        """A copy of the model with its EMA weights, to keep and to measure."""
        with self.averaged() as model:
            return copy.deepcopy(model).eval()

    def save(self) -> None:
        """Writes the state next to its place and renames it: a crash leaves the old state or the new one."""
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            tensors[f"{index}.value"] = parameter.detach()
            tensors[f"{index}.average"] = self.average[index]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{index}.{key}"] = value
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        # Channels-last strides are lost on disk; safetensors takes only contiguous tensors.
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, temporary, metadata={"loop": json.dumps({"name": self.name, "step": self.step})})
        os.replace(temporary, self.state_file)

    def _restore(self) -> None:
        with safe_open(self.state_file, framework="pt") as file:
            self.step = json.loads(file.metadata()["loop"])["step"]
            for index, parameter in enumerate(self.parameters):
                state = {key: file.get_tensor(f"{index}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in state.items()
                }
                self.average[index].copy_(file.get_tensor(f"{index}.average"))
                parameter.data.copy_(file.get_tensor(f"{index}.value"))

    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)


@contextmanager
def progress(name: str, *, total: int, done: int = 0, per_step: int = 1) -> Iterator[Callable[[float], None]]:
    """A progress bar with images per second and time left; plain lines twice a minute where there is no terminal."""
    started, printed, first = time.monotonic(), time.monotonic(), done
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=done, note="")
        smooth: float | None = None

        def advance(loss: float) -> None:
            nonlocal done, printed, smooth
            done += 1
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            per_s = (done - first) / (time.monotonic() - started)
            note = f"loss {smooth:.4f}, {per_s * per_step:.1f} images/s"
            bar.update(task, completed=done, note=note)
            if not console.is_terminal and (time.monotonic() - printed > 30 or done == total):
                printed = time.monotonic()
                minutes = (total - done) / per_s / 60
                print(f"{name} {done}/{total}: {note}, {minutes:.1f} min left", flush=True)

        yield advance
