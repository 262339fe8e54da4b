"""A run that was stopped and resumed equals one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.loop import LoopConfig, TrainingLoop, one_cycle

CONFIG = LoopConfig(steps=40, batch=16, learning_rate=3e-2)


def toy_loop(folder: Path) -> TrainingLoop:
    torch.manual_seed(0)
    return TrainingLoop(
        "toy", nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1)), CONFIG, state_file=folder / "toy.safetensors"
    )


def run(loop: TrainingLoop, until: int) -> None:
    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        inputs = torch.randn(CONFIG.batch, 3, generator=generator)
        return (loop.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    loop.run(loss_of, until=until)


def test_resuming_changes_nothing(tmp_path: Path) -> None:
    whole = toy_loop(tmp_path / "whole")
    run(whole, 40)
    run(toy_loop(tmp_path / "parts"), 13)
    resumed = toy_loop(tmp_path / "parts")
    assert resumed.step == 13
    run(resumed, 40)
    for mine, theirs in zip(resumed.parameters + resumed.average, whole.parameters + whole.average, strict=True):
        assert torch.equal(mine, theirs)


def test_a_finished_run_takes_no_more_steps(tmp_path: Path) -> None:
    run(toy_loop(tmp_path), 40)
    again = toy_loop(tmp_path)
    before = [p.clone() for p in again.parameters]
    run(again, 40)
    assert all(map(torch.equal, before, again.parameters))


def test_the_average_is_lent_and_given_back(tmp_path: Path) -> None:
    loop = toy_loop(tmp_path)
    run(loop, 20)
    trained = [p.detach().clone() for p in loop.parameters]
    with loop.averaged():
        assert all(map(torch.equal, loop.parameters, loop.average))
        assert not torch.equal(trained[0], loop.average[0])
    assert all(map(torch.equal, loop.parameters, trained))


def test_one_cycle_rises_then_falls() -> None:
    rates = [one_cycle(step, CONFIG) for step in range(CONFIG.steps)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(CONFIG.learning_rate)
    assert rates[-1] < 0.03 * CONFIG.learning_rate
