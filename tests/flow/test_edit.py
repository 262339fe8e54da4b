"""FlowEdit against the loop of its paper."""

from __future__ import annotations

import numpy as np
import pytest

from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Program, Role
from streamflow.flow.samplers import SamplerRequest, compile_sampler
from streamflow.flow.spec import FlowSpec
from tests.flow.reference import run_program

RNG = np.random.default_rng(1)
SOURCE, NOISE = RNG.standard_normal((2, 6))
DRAWS = RNG.standard_normal((20, 6))
SHIFT = {Role.TARGET: 0.7, Role.SOURCE: -0.4, Role.NEGATIVE: 0.1}


def field(x: np.ndarray, timestep: float, role: Role) -> np.ndarray:
    return np.sin(x + timestep / 1000) + SHIFT[role]


def guided(x: np.ndarray, sigma: float, role: Role, scale: float) -> np.ndarray:
    negative = field(x, 1000 * sigma, Role.NEGATIVE)
    return negative + scale * (field(x, 1000 * sigma, role) - negative)


def sequential(steps: int, n_max: int, n_min: int, source_scale: float, scale: float) -> np.ndarray:
    """Algorithm 1 of the paper, with one draw for each step."""
    grid = [1 - k / steps for k in range(steps)] + [0.0]
    edit = SOURCE
    x = SOURCE
    for k in range(steps - n_max, steps):
        sigma, h = grid[k], grid[k + 1] - grid[k]
        if steps - k > n_min:
            noised = (1 - sigma) * SOURCE + sigma * DRAWS[k]
            difference = guided(edit + noised - SOURCE, sigma, Role.TARGET, scale) - guided(
                noised, sigma, Role.SOURCE, source_scale
            )
            edit = edit + h * difference
            x = edit
        else:
            if steps - k == n_min:
                x = edit + ((1 - sigma) * SOURCE + sigma * DRAWS[k]) - SOURCE
            x = x + h * guided(x, sigma, Role.TARGET, scale)
    return x


@pytest.mark.parametrize(("n_max", "n_min"), [(10, 0), (7, 0), (7, 3), (5, 5)])
def test_programs_equal_the_algorithm(n_max: int, n_min: int) -> None:
    sampler = f"flowedit[source_guidance=1.5,last_plain={n_min}]"
    program = compile_sampler(sampler, SamplerRequest(10, Guidance(5.5), strength=n_max / 10), FlowSpec())
    got = run_program(program, field, NOISE, source=SOURCE, draw=lambda number: DRAWS[number])
    np.testing.assert_allclose(got, sequential(10, n_max, n_min, 1.5, 5.5), rtol=0, atol=1e-12)
    assert program.roles == ({Role.TARGET, Role.NEGATIVE} if n_min == n_max else set(Role))


@pytest.mark.parametrize("resume_at", [4, 7, 9])
def test_an_edit_under_way_goes_on_as_it_would_have(resume_at: int) -> None:
    def program(resume_at: int) -> Program:
        request = SamplerRequest(10, Guidance(2.0), strength=0.8, resume_at=resume_at)
        return compile_sampler("flowedit[last_plain=3]", request, FlowSpec())

    whole, rest = program(0), program(resume_at)
    assert rest.ops == tuple(op for op in whole.ops if op.step >= resume_at)


@pytest.mark.parametrize("mask", [None, np.array([1.0, 0.9, 0.6, 0.5, 0.1, 0.0])])
def test_equal_texts_leave_the_image_as_it_is(mask: np.ndarray | None) -> None:
    program = compile_sampler("flowedit", SamplerRequest(8, strength=0.75), FlowSpec())

    def same(y: np.ndarray, timestep: float, role: Role) -> np.ndarray:
        return field(y, timestep, Role.TARGET)

    got = run_program(program, same, NOISE, source=SOURCE, mask=mask, draw=lambda number: DRAWS[number])
    np.testing.assert_allclose(got, SOURCE, rtol=0, atol=1e-12)


def test_outside_a_mask_the_image_stays_as_it_is() -> None:
    mask = np.array([1.0, 1, 1, 0, 0, 0])
    for options in ("", "[last_plain=2]"):
        program = compile_sampler("flowedit" + options, SamplerRequest(8, strength=0.75), FlowSpec())
        got = run_program(program, field, NOISE, source=SOURCE, mask=mask, draw=lambda number: DRAWS[number])
        np.testing.assert_allclose(got[3:], SOURCE[3:], rtol=0, atol=1e-12)
        assert np.abs(got[:3] - SOURCE[:3]).max() > 0.05
