"""The running batch on networks with a closed form."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamflow.batching.engine import Engine
from streamflow.batching.slots import Image
from streamflow.errors import GenerationError
from streamflow.flow.noise import initial_noise
from streamflow.flow.programs import Op, Prediction, Program, euler
from streamflow.flow.schedules import rectified_flow_schedule

SHAPE = (2, 3, 3)


class Field:
    """A velocity field `a x + t + b`, with `b` from the conditioning; records the rows of every call."""

    name, row_invariant = "field", True

    def __init__(self, row_counts: tuple[int, ...] | None = None) -> None:
        self.row_counts = row_counts
        self.calls: list[Tensor] = []

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(timestep.clone())
        bias = conditioning["bias"]
        if (bias == 666).any():
            raise RuntimeError("cursed row")
        return 0.3 * latents + timestep.view(-1, 1, 1, 1) / 1000 + bias.view(-1, 1, 1, 1)


def image(
    handle: int,
    *,
    steps: int = 3,
    guidance_scale: float = 1.0,
    bias: float = 0.5,
    shape: tuple[int, ...] = SHAPE,
    **more: object,
) -> Image:
    program = euler(rectified_flow_schedule(steps), Prediction(), guidance_scale=guidance_scale)
    fields = {
        "program": program,
        "noise": initial_noise(handle, shape),
        "conditioning": {"bias": torch.tensor([bias])},
        "unconditional": {"bias": torch.tensor([-0.25])},
        **more,
    }
    return Image(handle, **fields)  # type: ignore[arg-type]


def alone(spec: Image) -> Tensor:
    """The definition, written out for one image in float64 without the engine."""
    x, c = spec.program.start_n * spec.noise.double(), torch.zeros_like(spec.noise, dtype=torch.float64)
    if spec.source is not None:
        x = x + spec.program.start_z * spec.source.double()
    for op in spec.program.ops:
        y = op.i_x * x + op.i_c * c
        base = 0.3 * y + op.timestep / 1000
        o = base + spec.conditioning["bias"].item()
        if op.guided:
            assert spec.unconditional is not None
            unconditional = base + spec.unconditional["bias"].item()
            o = unconditional + op.guidance_scale * (o - unconditional)
        x, c = op.p_x * x + op.p_c * c + op.p_o * o, op.g_c * c + op.g_o * o
        if spec.mask is not None:
            assert spec.source is not None
            kept = op.k_z * spec.source + op.k_n * spec.noise
            x = spec.mask * x + (1 - spec.mask) * kept
    return x


def drive(engine: Engine, waiting: list[Image]) -> dict[object, Tensor]:
    """Runs all images, admitting whenever there is room."""
    done: dict[object, Tensor] = {}
    while waiting or len(engine):
        while waiting and engine.free:
            engine.admit(waiting.pop(0))
        report = engine.tick()
        engine.check_integrity()
        assert not report.failed
        done |= {handle: torch.from_numpy(latents) for handle, latents in report.retired.items()}
    return done


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.0, 1.0, 1.5, 7.5])), min_size=1, max_size=12),
    st.integers(1, 6),
    st.sampled_from([None, (4,), (1, 2, 8)]),
)
def test_any_mix_gives_every_image_what_it_gets_alone(
    mix: list[tuple[int, float]], capacity: int, row_counts: tuple[int, ...] | None
) -> None:
    images = [image(k, steps=steps, guidance_scale=g, bias=0.1 * k) for k, (steps, g) in enumerate(mix)]
    done = drive(Engine({"base": Field(row_counts)}, capacity=capacity, dtype=torch.float64), list(images))
    assert done.keys() == {spec.handle for spec in images}
    for spec in images:
        torch.testing.assert_close(done[spec.handle].double(), alone(spec), rtol=1e-5, atol=1e-6)


def test_float64_state_reproduces_the_definition_to_rounding() -> None:
    spec = image(1, steps=7, guidance_scale=3.0, noise=initial_noise(1, SHAPE).double())
    engine = Engine({"base": Field()}, capacity=1, dtype=torch.float64)
    engine.admit(spec)
    table = next(iter(engine._tables.values()))
    for _ in range(7):
        latents = table.latents[0]
        engine.tick()
    torch.testing.assert_close(latents, alone(spec), rtol=0, atol=1e-13)


def test_images_at_different_timesteps_share_one_network_call() -> None:
    field = Field()
    engine = Engine({"base": field}, capacity=4)
    engine.admit(image(0, steps=4))
    engine.tick()
    engine.admit(image(1, steps=2))
    report = engine.tick()
    assert field.calls[-1].tolist() == [750.0, 1000.0]
    assert report.timesteps == [750.0, 1000.0]
    assert (report.groups, report.rows) == (1, 2)


def test_unguided_images_cost_one_row_and_guided_ones_two() -> None:
    engine = Engine({"base": Field((8,))}, capacity=4)
    engine.admit(image(0, guidance_scale=1.0))
    engine.admit(image(1, guidance_scale=2.0))
    report = engine.tick()
    assert (report.rows, report.padded_rows) == (3, 8)


def test_sizes_run_side_by_side() -> None:
    images = [image(0), image(1, shape=(2, 5, 3)), image(2, steps=5, shape=(2, 5, 3))]
    done = drive(Engine({"base": Field()}, capacity=3), list(images))
    for spec in images:
        torch.testing.assert_close(done[spec.handle].double(), alone(spec), rtol=1e-5, atol=1e-6)


def test_image_to_image_with_a_mask_keeps_what_is_outside() -> None:
    source = torch.randn(SHAPE)
    mask = torch.zeros(SHAPE[1:])
    mask[0] = 1
    masked = image(3, steps=6, source=source, mask=mask)
    done = drive(Engine({"base": Field()}, capacity=2), [masked, image(4, steps=6)])
    torch.testing.assert_close(done[3][:, 1:], source[:, 1:])
    torch.testing.assert_close(done[3].double(), alone(masked), rtol=1e-5, atol=1e-6)


def test_ops_that_use_the_cache_and_draws_of_noise() -> None:
    ops = (
        Op(name="F", timestep=1000, sigma=1, g_o=1),
        Op(name="C", timestep=500, sigma=0.5, i_c=-0.5, p_c=-0.25, p_o=-0.25, g_o=1),
        Op(name="R", timestep=0, sigma=0, i_c=-0.5, p_c=-0.5, p_o=-0.25, g_c=1, g_o=0.5),
    )
    spec = image(5, program=Program(ops))
    done = drive(Engine({"base": Field()}, capacity=2), [spec, image(6)])
    torch.testing.assert_close(done[5].double(), alone(spec), rtol=1e-5, atol=1e-6)
    noisy = Program((Op(name="S", timestep=1000, sigma=0, p_x=0.0, p_n=1.0, draw=0),))
    runs = [
        drive(Engine({"base": Field()}, capacity=2), [image(7, program=noisy, seed=9), *rest])[7]
        for rest in ([], [image(8)])
    ]
    assert torch.equal(runs[0], runs[1])
    assert runs[0].std() > 0.3


def test_only_the_guilty_image_fails() -> None:
    engine = Engine({"base": Field()}, capacity=4)
    good = [image(0), image(2, steps=5)]
    for spec in (good[0], image(1, bias=666.0), good[1]):
        engine.admit(spec)
    first = engine.tick()
    assert first.failed.keys() == {1}
    assert isinstance(first.failed[1], GenerationError)
    done = drive(engine, [])
    for spec in good:
        torch.testing.assert_close(done[spec.handle].double(), alone(spec), rtol=1e-5, atol=1e-6)


def test_an_image_that_turns_non_finite_fails_alone_and_its_slot_is_clean() -> None:
    engine = Engine({"base": Field()}, capacity=2)
    engine.admit(image(0, noise=torch.full(SHAPE, torch.nan)))
    engine.admit(image(1))
    reports = [engine.tick() for _ in range(3)]
    assert reports[-1].failed.keys() == {0}
    assert reports[-1].retired.keys() == {1}
    spec = image(2)
    torch.testing.assert_close(drive(engine, [spec])[2].double(), alone(spec), rtol=1e-5, atol=1e-6)


def test_cancel_frees_the_slot_at_once_and_disturbs_nobody() -> None:
    engine = Engine({"base": Field()}, capacity=2)
    engine.admit(image(0, steps=9))
    engine.admit(image(1, steps=4))
    engine.tick()
    engine.cancel(0)
    engine.cancel("never heard of")
    assert engine.free == 1
    late = image(2)
    done = drive(engine, [late])
    assert done.keys() == {1, 2}
    torch.testing.assert_close(done[1].double(), alone(image(1, steps=4)), rtol=1e-5, atol=1e-6)


def test_previews_come_at_the_interval_and_not_at_the_end() -> None:
    engine = Engine({"base": Field()}, capacity=1)
    engine.admit(image(0, steps=6, preview_interval=2))
    steps = [preview.step for _ in range(6) for preview in engine.tick().previews]
    assert steps == [2, 4]


def test_admission_refuses_what_cannot_run() -> None:
    engine = Engine({"base": Field()}, capacity=1)
    with pytest.raises(ValueError, match="refiner"):
        engine.admit(image(0, program=Program((Op(name="R", timestep=0, sigma=0, network="refiner"),))))
    with pytest.raises(ValueError, match="unconditional"):
        engine.admit(image(0, guidance_scale=2.0, unconditional=None))
    engine.admit(image(0))
    with pytest.raises(ValueError, match="in use"):
        engine.admit(image(1))
    engine.check_integrity()


def test_many_sizes_do_not_fill_the_memory() -> None:
    engine = Engine({"base": Field()}, capacity=1)
    for width in range(1, 40):
        drive(engine, [image(width, steps=1, shape=(2, 3, width))])
    assert len(engine._tables) <= 16
