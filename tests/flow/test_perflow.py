"""PeRFlow's tables against published figures and their own definition."""

from __future__ import annotations

import numpy as np
import pytest

from streamflow.errors import InvalidRequestError
from streamflow.flow.guidance import Guidance
from streamflow.flow.perflow import Windows, perflow
from streamflow.flow.programs import Op
from streamflow.flow.samplers import SamplerRequest, compile_sampler
from streamflow.flow.spec import FlowSpec, WindowPrediction, WindowSpec
from tests.flow.reference import run_program


def ops(steps: int, prediction: WindowPrediction = "diff_eps", *, windows: int = 4, options: str = "") -> list[Op]:
    flow = FlowSpec(windows=WindowSpec(prediction=prediction, windows=windows))
    return list(compile_sampler(f"perflow[{options}]", SamplerRequest(steps), flow).ops)


@pytest.mark.parametrize(
    ("t", "a", "b_diff", "b_ddim"),
    [
        (1000, 3.485786, -3.339267, -2.506379),
        (750, 2.214450, -1.975801, -1.300941),
        (500, 1.559649, -1.196873, -0.755837),
        (250, 1.216255, -0.692297, -0.663756),
    ],
)
def test_four_steps_equal_the_published_scheduler(t: int, a: float, b_diff: float, b_ddim: float) -> None:
    for prediction, b in (("diff_eps", b_diff), ("ddim_eps", b_ddim)):
        op = {round(op.timestep): op for op in ops(4, prediction)}[t]
        assert op.timestep == t
        assert (op.p_x, op.p_o) == pytest.approx((a, b), abs=1e-6)


def test_eight_steps_equal_the_published_scheduler() -> None:
    expected = {
        1000: (2.242893, -1.669634),
        875: (1.554147, -0.744411),
        750: (1.607225, -0.987900),
        625: (1.377810, -0.614662),
        500: (1.279824, -0.598436),
        375: (1.218643, -0.467592),
        250: (1.108127, -0.346148),
        125: (1.097576, -0.312372),
    }
    got = ops(8)
    assert [op.timestep for op in got] == list(expected)
    for op in got:
        assert (op.p_x, op.p_o) == pytest.approx(expected[round(op.timestep)], abs=1e-6)


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (5, [1000, 875, 750, 500, 250]),
        (6, [1000, 875, 750, 625, 500, 250]),
        (9, [1000, 916, 833, 750, 625, 500, 375, 250, 125]),
    ],
)
def test_timesteps(steps: int, timesteps: list[int]) -> None:
    assert [op.timestep for op in ops(steps)] == pytest.approx(timesteps)


def test_the_published_scheduler_cuts_times_and_exact_ones_do_not() -> None:
    assert [op.timestep for op in ops(20)][-2:] == pytest.approx([99, 49])
    assert [op.timestep for op in ops(20, options="exact=true")][-2:] == pytest.approx([100, 50])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [1, 4, 7, 100])
def test_as_many_steps_as_there_are_times_and_no_more(count: int, exact: bool) -> None:
    most = Windows(None, count).max_steps(exact=exact)
    options = f"windows={count},exact={str(exact).lower()}"
    timesteps = [op.timestep for op in ops(most, options=options)]
    assert len(set(timesteps)) == most > (9000 if exact else 890)
    assert timesteps == sorted(timesteps, reverse=True)
    with pytest.raises(InvalidRequestError, match=f"steps: got {most + 1}; allowed: at most {most} with {count} windo"):
        ops(most + 1, options=options)


@pytest.mark.parametrize("count", [3, 6, 7])
def test_exact_times_never_overshoot_a_window(count: int) -> None:
    windows = Windows(WindowSpec(windows=count), count)
    for steps in range(count, 4 * count):
        times = windows.times(steps, exact=True)
        for t, after in zip(times, [*times[1:], 0.0], strict=True):
            _, end = windows.around(t)
            assert after - end >= -1e-12
            assert t > end
        # Every window is entered at its start.
        assert {round(edge, 9) for edge in windows.edges[:-1]} <= {round(t, 9) for t in times}


@pytest.mark.parametrize("prediction", ["diff_eps", "ddim_eps"])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_a_window_is_straight_so_that_its_steps_add_up(prediction: WindowPrediction, count: int) -> None:
    # Within a window a network that is consistent predicts the same end from every point: then one step for each
    # window gives what many give.
    spec = WindowSpec(prediction=prediction, windows=count)
    windows = Windows(spec, count)
    rng = np.random.default_rng(0)
    ends = dict(zip(windows.edges[1:], rng.standard_normal((count, 5)), strict=True))

    def network(y: np.ndarray, timestep: float, role: object) -> np.ndarray:
        lam, eta, end, _ = windows.ends(timestep / 1000)
        return (ends[end] - lam * y) / eta

    noise = rng.standard_normal(5)
    for steps in (count, 2 * count + 1, 5 * count):
        table = perflow(windows, windows.times(steps, exact=True), FlowSpec(windows=spec), Guidance(), first=0)
        program = type(compile_sampler("euler", SamplerRequest(1), FlowSpec()))(tuple(table))
        got = run_program(program, network, noise)
        np.testing.assert_allclose(got, ends[0.0], rtol=0, atol=1e-9)


def test_a_velocity_network_takes_plain_steps() -> None:
    for flow in (FlowSpec(), FlowSpec(windows=WindowSpec(prediction="velocity"))):
        program = compile_sampler("perflow[windows=3,exact=true]", SamplerRequest(7), flow)
        assert all(op.p_x == 1 for op in program.ops)
        assert sum(op.p_o for op in program.ops) == pytest.approx(-1)


def test_image_to_image_starts_on_the_line_between_the_windows_ends() -> None:
    flow = FlowSpec(windows=WindowSpec())
    windows = Windows(flow.windows, 4)
    at_start = compile_sampler("perflow", SamplerRequest(8, strength=0.5), flow)
    abar = windows.abar(0.5)
    assert (at_start.start_z, at_start.start_n) == pytest.approx((abar**0.5, (1 - abar) ** 0.5))
    inside = compile_sampler("perflow", SamplerRequest(8, strength=0.375), flow)
    assert inside.ops[0].timestep == 375
    middle = [(a + b) / 2 for a, b in zip(windows.noising(0.5), windows.noising(0.25), strict=True)]
    assert (inside.start_z, inside.start_n) == pytest.approx(middle)


def test_a_piecewise_checkpoint_takes_no_other_sampler() -> None:
    with pytest.raises(ValueError, match="this checkpoint's flow is piecewise"):
        compile_sampler("euler", SamplerRequest(4), FlowSpec(windows=WindowSpec()))
