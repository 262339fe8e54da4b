"""Blocks against straightforward sequential implementations and closed forms, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow.errors import InvalidRequestError
from streamflow.flow.guidance import Guidance, GuidanceMode, read_interval
from streamflow.flow.programs import REFINER, Role
from streamflow.flow.samplers import SamplerRequest, compile_sampler, served
from streamflow.flow.spec import FlowSpec, RefinerSpec, WindowSpec
from tests.flow.reference import run_program

FLOW = FlowSpec(evaluates_data=True, refiner=RefinerSpec(max_step=1.0))
NOISE = np.random.default_rng(3).standard_normal((2, 3))


def velocity(x: np.ndarray, sigma: float) -> np.ndarray:
    """A nonlinear field."""
    return np.sin(2 * x + sigma) - 0.5 * x * sigma


def refined(x: np.ndarray, v: np.ndarray, sigma: float) -> np.ndarray:
    """What a refiner might say: part of the way from the old velocity to the one here."""
    return 0.7 * (velocity(x, sigma) - v) + 0.01 * x


def sequential(blocks: str, steps: int, x: np.ndarray) -> np.ndarray:
    """The block forms as the papers write them: a loop, a cache, no table."""
    grid = [1 - k / steps for k in range(steps)] + [0.0]
    cache = np.zeros_like(x)
    for block, t, t_next in zip(blocks, grid, grid[1:], strict=False):
        h = t_next - t
        if block == "E":
            cache = velocity(x, t)
            x = x + h * cache
        elif block == "H":
            d0 = velocity(x, t)
            d1 = velocity(x + h * d0, t_next)
            x, cache = x + h / 2 * (d0 + d1), d1
        elif block == "P":
            d1 = velocity(x + h * cache, t_next)
            x, cache = x + h / 2 * (cache + d1), d1
        elif block == "M":
            cache = velocity(x + h / 2 * velocity(x, t), t + h / 2)
            x = x + h * cache
        elif block == "L":
            cache = velocity(x + h / 2 * cache, t + h / 2)
            x = x + h * cache
        elif block == "R":
            g = cache + refined(x, cache, t)
            d = g + refined(x + h * g, g, t_next)
            x, cache = x + h / 2 * (g + d), g
    return x


def final(sampler: str, steps: int, *, flow: FlowSpec = FLOW, noise: np.ndarray = NOISE) -> np.ndarray:
    program = compile_sampler(sampler, SamplerRequest(steps), flow)
    sign = flow.velocity_sign
    return run_program(
        program,
        lambda y, timestep, role: sign * velocity(y, timestep / 1000),
        noise,
        refiner=lambda y, c, timestep, role: refined(y, c, timestep / 1000),
    )


@pytest.mark.parametrize(
    ("sampler", "blocks"),
    [
        ("euler", "EEEEE"),
        ("heun", "HHHHH"),
        ("midpoint", "MMMMM"),
        ("fireflow", "MLLLL"),
        ("pseudo", "HPPPP"),
        ("H2P4R2", "HHPPPPRR"),
        ("H1P5R3", "HPPPPPRRR"),
        ("E1R1M2P1R2H1", "ERMMPRRH"),
        ("P3", "HPP"),
        ("instaflow", "EEE"),
    ],
)
def test_programs_equal_the_block_forms(sampler: str, blocks: str) -> None:
    for flow in (FLOW, FlowSpec(evaluates_data=True, refiner=RefinerSpec(1.0), velocity_sign=-1.0)):
        np.testing.assert_allclose(
            final(sampler, len(blocks), flow=flow), sequential(blocks, len(blocks), NOISE), rtol=0, atol=1e-12
        )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("EHMPR"), st.integers(1, 4)), min_size=1, max_size=6))
def test_every_mixed_notation_equals_its_block_form(runs: list[tuple[str, int]]) -> None:
    if runs[0][0] == "R":
        runs[0] = ("H", runs[0][1])
    blocks = "".join(letter * count for letter, count in runs)
    expected = ("H" if blocks[0] == "P" else blocks[0]) + blocks[1:]
    notation = "".join(f"{letter}{count}" for letter, count in runs)
    np.testing.assert_allclose(
        final(notation, len(blocks)), sequential(expected, len(blocks), NOISE), rtol=0, atol=1e-12
    )


def orders(sampler: Callable[[int], str]) -> list[float]:
    """Observed orders on dx/dsigma = x - sin(3 sigma), whose solution is known, for halved steps."""
    field: Callable[[np.ndarray, float], np.ndarray] = lambda x, s: x - np.sin(3 * s)  # noqa: E731
    # x(s) = A e^s + (sin 3s + 3 cos 3s) / 10
    particular: Callable[[float], float] = lambda s: (math.sin(3 * s) + 3 * math.cos(3 * s)) / 10  # noqa: E731
    exact = (1.0 - particular(1.0)) / math.e + particular(0.0)
    errors = []
    for steps in (32, 64, 128, 256):
        program = compile_sampler(sampler(steps), SamplerRequest(steps), FLOW)
        got = run_program(program, lambda y, timestep, role: field(y, timestep / 1000), np.ones(1))
        errors.append(abs(float(got[0]) - exact))
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize(
    ("sampler", "order"),
    [("euler", 1), ("heun", 2), ("midpoint", 2), ("fireflow", 2), ("pseudo", 2)],
)
def test_orders_of_convergence(sampler: str, order: int) -> None:
    assert orders(lambda steps: sampler)[-1] == pytest.approx(order, abs=0.1)


def test_a_last_euler_step_where_data_cannot_be_evaluated_keeps_the_order() -> None:
    flow = FlowSpec(evaluates_data=False)
    program = compile_sampler("heun", SamplerRequest(4), flow)
    assert [op.name for op in program.ops] == ["F", "C", "F", "C", "F", "C", "E"]
    assert min(op.timestep for op in program.ops) == 250
    assert [op.name for op in compile_sampler("pseudo", SamplerRequest(1), flow).ops] == ["E"]
    refined_last = compile_sampler("H1R1", SamplerRequest(), FlowSpec(refiner=RefinerSpec(1.0)))
    assert [op.name for op in refined_last.ops] == ["F", "C", "RF", "RC"]


@pytest.mark.parametrize("sampler", ["euler", "heun", "pseudo", "midpoint", "fireflow", "H1P2M1", "euler-sde[eta=0]"])
def test_a_straight_flow_is_exact_and_previews_are_its_data(sampler: str) -> None:
    data = np.random.default_rng(4).standard_normal(NOISE.shape)
    previews: list[np.ndarray] = []
    program = compile_sampler(sampler, SamplerRequest(4), FLOW)
    got = run_program(program, lambda y, timestep, role: NOISE - data, NOISE, previews=previews)
    np.testing.assert_allclose(got, data, rtol=0, atol=1e-12)
    for preview in previews:
        np.testing.assert_allclose(preview, data, rtol=0, atol=1e-12)


def test_previews_of_the_refiner_are_the_data_on_a_straight_flow() -> None:
    data = np.random.default_rng(4).standard_normal(NOISE.shape)
    previews: list[np.ndarray] = []
    program = compile_sampler("H1R2", SamplerRequest(), FLOW)
    run_program(
        program,
        lambda y, timestep, role: NOISE - data,
        NOISE,
        refiner=lambda y, c, timestep, role: np.zeros_like(y),
        previews=previews,
    )
    for preview in previews:
        np.testing.assert_allclose(preview, data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_stochastic_euler_equals_its_definition(eta: float) -> None:
    steps, rng = 5, np.random.default_rng(5)
    draws = rng.standard_normal((steps, *NOISE.shape))
    x, grid = NOISE, [1 - k / steps for k in range(steps)] + [0.0]
    for k in range(steps):
        sigma, after = grid[k], grid[k + 1]
        u = velocity(x, sigma)
        x0, n = x - sigma * u, x + (1 - sigma) * u
        x = (1 - after) * x0 + after * (math.sqrt(1 - eta**2) * n + eta * draws[k])
    program = compile_sampler(f"euler-sde[eta={eta}]", SamplerRequest(steps), FLOW)
    got = run_program(program, lambda y, t, role: velocity(y, t / 1000), NOISE, draw=lambda number: draws[number])
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)


def test_stochastic_euler_with_eta_1_equals_the_reference() -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps = 6
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    torch.manual_seed(0)
    x = torch.from_numpy(NOISE)
    for timestep in scheduler.timesteps:
        u = torch.from_numpy(velocity(x.numpy(), float(timestep) / 1000))
        x = scheduler.step(u, timestep, x).prev_sample
    torch.manual_seed(0)
    draws = [torch.randn_like(torch.from_numpy(NOISE).float()).double().numpy() for _ in range(steps)]
    program = compile_sampler("euler-sde", SamplerRequest(steps), FLOW)
    got = run_program(program, lambda y, t, role: velocity(y, t / 1000), NOISE, draw=lambda number: draws[number])
    np.testing.assert_allclose(got, x.numpy(), rtol=0, atol=2e-5)


def test_guidance_in_an_interval_drops_the_second_row() -> None:
    guidance = Guidance(scale=3.0, start_sigma=0.8, end_sigma=0.3)
    program = compile_sampler("euler", SamplerRequest(5, guidance), FLOW)
    assert [op.rows for op in program.ops] == [1, 2, 2, 2, 1]
    assert [op.guidance_scale for op in program.ops] == [1, 3, 3, 3, 1]
    heun = compile_sampler("heun", SamplerRequest(2, guidance), FLOW)
    assert [op.guidance_scale for op in heun.ops] == [1, 3, 3, 1]
    assert program.roles == {Role.TARGET, Role.NEGATIVE}
    assert compile_sampler("euler", SamplerRequest(5), FLOW).roles == {Role.TARGET}


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_guidance_in_an_interval_is_the_same_for_a_request_that_carries_float32(steps: int) -> None:
    for ends in ((0.9, 0.1), (0.8, 0.2), (0.7, 0.3), (0.6, 0.4)):
        programs = [
            compile_sampler("euler", SamplerRequest(steps, Guidance(3.0, *given)), FLOW)
            for given in (ends, map(float, np.array(ends, np.float32)))
        ]
        assert programs[0].ops == programs[1].ops


@pytest.mark.parametrize("value", [None, 0.5, (1,), (1, 0.5, 0.2), ("a", "b")])
def test_an_interval_has_two_ends(value: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"guidance_interval: got .* such as \(0\.9, 0\.2\)"):
        read_interval(value)  # type: ignore[arg-type]
    assert read_interval([np.float32(1), 0]) == (1.0, 0.0)


def test_the_refiner_runs_one_row_unless_it_was_trained_with_guidance() -> None:
    for guided in (False, True):
        flow = FlowSpec(evaluates_data=True, refiner=RefinerSpec(1.0, guided=guided))
        program = compile_sampler("H1R1", SamplerRequest(guidance=Guidance(2.0)), flow)
        assert [op.rows for op in program.ops] == [2, 2, 1 + guided, 1 + guided]


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        ("R2H1", "first block E, H, M or P"),
        ("X3", "there is no X"),
        ("H0", "each count 1 or more"),
        ("H1001", "1 to 1000 steps"),
        ("h2", "one of euler"),
        ("H2P", "one of euler"),
        ("", "one of euler"),
        ("nope", "one of euler"),
        ("blocks", "one of euler"),
        ("euler[", "one of euler"),
        ("euler[]x", "one of euler"),
        ("euler[a=1]", "the options shift"),
        ("euler[shift]", "the options shift"),
        ("euler[shift=2,shift=2]", "once each"),
        ("euler[,]", "the options shift"),
        ("euler[shift=2,]", "the options shift"),
        ("euler" + 200 * " ", "at most 200 printable characters"),
        (100 * "E1H1", "at most 200 printable characters"),
        ("heun[shift=nan]", r"shift = 0\.01 to 100"),
        ("heun[shift=x]", r"shift = 0\.01 to 100"),
        ("instaflow[shift=2]", "no options"),
        ("euler-sde[eta=1.1]", "eta = 0 to 1"),
        ("perflow[exact=maybe]", "exact = true or false"),
        ("perflow[prediction=diff_eps]", "prediction=velocity, which is what this checkpoint's network predicts"),
        ("perflow[windows=9]", "at least 9 with 9 windows"),
        ("flowedit", "only with an image"),
        ("H2P2", "4 with the sampler H2P2"),
    ],
)
def test_what_cannot_run_is_refused(sampler: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        compile_sampler(sampler, SamplerRequest(8), FLOW)


@pytest.mark.parametrize("windows", [None, WindowSpec()])
def test_what_is_listed_can_be_asked_for(windows: WindowSpec | None) -> None:
    flow = FlowSpec(windows=windows)
    for name in served(flow):
        assert len(compile_sampler(name, SamplerRequest(8, strength=1.0), flow)) >= 8


def test_a_refiner_that_is_not_there_is_refused_and_a_step_beyond_its_range_warns() -> None:
    with pytest.raises(InvalidRequestError, match="a checkpoint with a refiner"):
        compile_sampler("H1R1", SamplerRequest(), FlowSpec())
    flow = FlowSpec(refiner=RefinerSpec(max_step=0.25))
    (warning,) = compile_sampler("H1R1", SamplerRequest(), flow).warnings
    assert "a step of 0.5 in sigma and was trained for at most 0.25" in warning
    assert compile_sampler("H2R2", SamplerRequest(), flow).warnings == ()


def test_a_notation_says_its_steps_itself() -> None:
    assert len({op.step for op in compile_sampler("H2P4R2", SamplerRequest(), FLOW).ops}) == 8
    with pytest.raises(InvalidRequestError, match="steps"):
        compile_sampler("euler", SamplerRequest(), FLOW)


def test_image_to_image_spreads_the_blocks_over_the_steps_that_are_left() -> None:
    request = SamplerRequest(strength=0.5)
    program = compile_sampler("H2P4R2", request, FLOW)
    assert [op.name for op in program.ops] == ["F", "C", "C", "C", "RF", "RC"]
    assert (program.start_z, program.start_n) == (0.5, 0.5)
    assert program.ops[0].timestep == 500
    # It starts with a block that needs no earlier velocity.
    assert [op.name for op in compile_sampler("pseudo", SamplerRequest(4, strength=0.5), FLOW).ops] == ["F", "C", "C"]


def test_an_image_under_way_goes_on_with_an_evaluation_of_its_own() -> None:
    for sampler, names in (("pseudo", "FCC"), ("fireflow", "FMM"), ("H2R2", "FCRFRC"), ("E2R2", "FCRFRC")):
        program = compile_sampler(sampler, SamplerRequest(4, resume_at=2), FLOW)
        assert "".join(op.name for op in program.ops) == names
        assert program.ops[0].step == 2
    resumed = compile_sampler("H2P4R2", SamplerRequest(strength=0.5, resume_at=6), FLOW)
    assert [op.name for op in resumed.ops] == ["F", "C", "RF", "RC"]
    assert all(op.network == REFINER for op in resumed.ops[2:])


def test_residual_guidance_equals_its_formula() -> None:
    steps, scale, delta = 4, 2.5, 0.8
    source = np.random.default_rng(6).standard_normal(NOISE.shape)
    negative: Callable[[np.ndarray, float], np.ndarray] = lambda x, s: -velocity(x, s)  # noqa: E731

    def base(y: np.ndarray, timestep: float, role: Role) -> np.ndarray:
        return (negative if role is Role.NEGATIVE else velocity)(y, timestep / 1000)

    for mode in (GuidanceMode.SELF_NEGATIVE, GuidanceMode.ONETIME_NEGATIVE):
        guidance = Guidance(scale, mode=mode, residual=delta)
        program = compile_sampler("euler", SamplerRequest(steps, guidance, strength=1.0), FLOW)
        kept = NOISE - source if mode is GuidanceMode.SELF_NEGATIVE else negative(NOISE, 1.0)
        x = NOISE
        for k in range(steps):
            u = delta * kept + scale * (velocity(x, 1 - k / steps) - delta * kept)
            x = x - u / steps
        got = run_program(program, base, NOISE, source=source)
        np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)
        assert program.rows == steps + (mode is GuidanceMode.ONETIME_NEGATIVE)


def test_residual_guidance_needs_euler() -> None:
    guidance = Guidance(2.0, mode=GuidanceMode.SELF_NEGATIVE)
    for sampler in ("heun", "H2P2", "euler-sde", "perflow"):
        with pytest.raises(InvalidRequestError, match="need the sampler euler"):
            compile_sampler(sampler, SamplerRequest(4, guidance), FLOW)
