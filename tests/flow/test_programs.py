"""Programs against closed forms: no network, just the mathematics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from streamflow.errors import InvalidRequestError
from streamflow.flow.catalog import SAMPLERS, first_step, parse_sampler
from streamflow.flow.programs import COLUMNS, Op, Prediction, Program, euler
from streamflow.flow.samplers import COMPILERS, FlowSpec, SamplerRequest, compile_sampler
from streamflow.flow.schedules import rectified_flow_schedule, shift_sigmas


def test_schedule_falls_evenly_from_noise_to_data() -> None:
    assert rectified_flow_schedule(4).sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_shift_keeps_the_ends_and_matches_the_published_formula() -> None:
    sigmas = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigmas(sigmas, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert shifted[5].item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 25, 100])
def test_schedule_equals_the_scheduler_of_the_reference(steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        torch.testing.assert_close(
            rectified_flow_schedule(steps, shift=shift).sigmas.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7
        )


def run(program: Program, velocity: object, noise: torch.Tensor) -> torch.Tensor:
    """Runs a program on a closed-form velocity, op by op, as the definition in programs.py says."""
    x, c = program.start_n * noise, torch.zeros_like(noise)
    for op in program.ops:
        o = velocity(op.i_x * x + op.i_c * c, op.timestep / 1000)  # type: ignore[operator]
        x, c = op.p_x * x + op.p_c * c + op.p_o * o, op.g_c * c + op.g_o * o
    return x


def test_euler_is_exact_on_a_straight_flow() -> None:
    noise, data = torch.randn(2, 8, dtype=torch.float64)
    for steps in (1, 3, 10):
        program = euler(rectified_flow_schedule(steps), Prediction(), guidance_scale=1.0)
        torch.testing.assert_close(run(program, lambda x, t: noise - data, noise), data, rtol=0, atol=1e-12)


def test_a_network_that_predicts_the_opposite_sign_gives_the_same_trajectory() -> None:
    noise, data = torch.randn(2, 8, dtype=torch.float64)
    program = euler(rectified_flow_schedule(5), Prediction(velocity_sign=-1.0), guidance_scale=1.0)
    torch.testing.assert_close(run(program, lambda x, t: data - noise, noise), data, rtol=0, atol=1e-12)


def test_euler_converges_with_order_one() -> None:
    # dx / dsigma = x has the solution x(0) = x(1) / e.
    noise = torch.ones(1, dtype=torch.float64)
    errors = [
        abs(
            run(euler(rectified_flow_schedule(n), Prediction(), guidance_scale=1.0), lambda x, t: x, noise).item()
            - 1 / math.e
        )
        for n in (32, 64, 128)
    ]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([1, 1], abs=0.03)


def test_preview_is_the_data_on_a_straight_flow() -> None:
    noise, data = torch.randn(2, 8, dtype=torch.float64)
    program = euler(rectified_flow_schedule(4), Prediction(), guidance_scale=1.0)
    x = noise
    for op in program.ops:
        torch.testing.assert_close(op.v_y * x + op.v_o * (noise - data), data)
        x = x + op.p_o * (noise - data)


def test_start_of_an_image_is_its_source_noised() -> None:
    flow = FlowSpec()
    program = compile_sampler("euler", SamplerRequest(10, 1.0, 0.25), flow)
    # The SD family runs floor(10 * 0.25) = 2 steps, from sigma 0.2.
    assert len(program) == 2
    assert (program.start_z, program.start_n) == pytest.approx((0.8, 0.2))
    ceil = compile_sampler("euler", SamplerRequest(10, 1.0, 0.25), FlowSpec(round_up_strength=True))
    assert len(ceil) == 3
    whole = compile_sampler("euler", SamplerRequest(10, 1.0, 1.0), flow)
    assert (len(whole), whole.start_z, whole.start_n) == (10, 0.0, 1.0)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan])
def test_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(InvalidRequestError, match="strength"):
        first_step(10, strength, round_up=False)


def test_strength_counts_the_same_from_float32() -> None:
    for steps in range(1, 101):
        for strength in (k / 20 for k in range(20, 0, -1)):
            if int(strength * steps) > 0:
                as_sent = torch.tensor(strength).item()
                assert first_step(steps, as_sent, round_up=False) == first_step(steps, strength, round_up=False)


def test_strength_that_leaves_no_step_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match=r"at least 0\.25 with 4 steps; raise strength or steps"):
        first_step(4, 0.2, round_up=False)


def test_coefficients_are_the_table_in_float64() -> None:
    program = euler(rectified_flow_schedule(3), Prediction(), guidance_scale=4.0)
    assert program.coefficients.dtype == torch.float64
    assert program.coefficients.shape == (3, len(COLUMNS))
    for row, op in zip(program.coefficients.tolist(), program.ops, strict=True):
        assert row == [getattr(op, name) for name in COLUMNS]


def test_program_prints_as_a_table() -> None:
    lines = str(euler(rectified_flow_schedule(2), Prediction(), guidance_scale=2.0)).splitlines()
    assert lines[0].split() == ["op", "net", "p_o", "g_o", "k_z", "k_n", "v_o", "timestep", "guidance_scale"]
    assert lines[1].split()[:3] == ["E", "base", "-0.500000"]


def test_every_sampler_of_the_catalog_compiles() -> None:
    assert SAMPLERS.keys() == COMPILERS.keys()
    for name in SAMPLERS:
        program = compile_sampler(name, SamplerRequest(8, 1.0), FlowSpec())
        assert all(isinstance(op, Op) for op in program.ops)


@pytest.mark.parametrize("text", ["", "nope", "euler[", "euler[]x", "euler[a=1]", "euler[a]", "eu ler"])
def test_sampler_strings_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="sampler"):
        parse_sampler(text)


def test_sampler_string_with_empty_options() -> None:
    assert parse_sampler(" euler[] ") == ("euler", {})
