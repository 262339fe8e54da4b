"""Schedules against the reference's scheduler, and where image to image starts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamflow.errors import InvalidRequestError
from streamflow.flow.schedules import DynamicShift, ScheduleSpec, first_step, shift_sigma

STEPS = [1, 2, 4, 7, 25, 28, 100]


def test_a_uniform_schedule_falls_evenly_from_noise_to_data() -> None:
    assert ScheduleSpec().sigmas(4) == (1, 0.75, 0.5, 0.25, 0)


def test_shift_keeps_the_ends_and_matches_the_published_formula() -> None:
    assert shift_sigma(0, 3) == 0
    assert shift_sigma(1, 3) == 1
    assert shift_sigma(0.5, 3) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_schedules_equal_the_reference(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    np.testing.assert_allclose(ScheduleSpec(shift).sigmas(steps), scheduler.sigmas.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedules_that_the_scheduler_makes_equal_it(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    got = ScheduleSpec(shift, grid="to-minimum").sigmas(steps)
    np.testing.assert_allclose(got, scheduler.sigmas.numpy(), rtol=1e-5, atol=1e-6)


def test_the_tail_of_stable_diffusion_3() -> None:
    assert ScheduleSpec(3.0, grid="to-minimum").sigmas(28)[-3:] == pytest.approx((0.111, 0.0089, 0), abs=5e-4)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_dynamic_schedules_equal_the_reference(steps: int, tokens: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=calculate_shift(tokens))
    got = ScheduleSpec(DynamicShift()).sigmas(steps, tokens=tokens)
    np.testing.assert_allclose(got, scheduler.sigmas.numpy(), rtol=1e-5, atol=1e-6)


def test_dynamic_shift_of_two_sizes() -> None:
    assert math.log(DynamicShift().shift(1024)) == pytest.approx(0.63, abs=0.005)
    assert math.log(DynamicShift().shift(4096)) == pytest.approx(1.15)


def test_image_to_image_starts_where_the_families_reference_pipelines_do() -> None:
    assert first_step(10, 0.25, round_up=True) == 7
    assert first_step(10, 0.25, round_up=False) == 8


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan])
def test_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(InvalidRequestError, match="strength"):
        first_step(10, strength, round_up=False)


def test_strength_counts_the_same_from_float32() -> None:
    for steps in range(1, 101):
        for strength in (k / 20 for k in range(20, 0, -1)):
            if int(strength * steps) > 0:
                as_sent = float(np.float32(strength))
                assert first_step(steps, as_sent, round_up=False) == first_step(steps, strength, round_up=False)


def test_strength_that_leaves_no_step_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match=r"at least 0\.25 with 4 steps; raise strength or steps"):
        first_step(4, 0.2, round_up=False)
