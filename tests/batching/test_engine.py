"""The running batch on networks with a closed form."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakSet

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamflow.batching.compiled import CompiledStep
from streamflow.batching.engine import MAX_LAYOUTS, Engine
from streamflow.batching.slots import Image, SlotTable
from streamflow.batching.step import StepFunction, run_step
from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.flow.guidance import Guidance, GuidanceMode
from streamflow.flow.noise import drawn_noise, initial_noise
from streamflow.flow.programs import Op, Role
from streamflow.flow.samplers import SamplerRequest, compile_sampler
from streamflow.flow.spec import FlowSpec, RefinerSpec
from streamflow.types import SlotState
from tests.flow.reference import run_program

SHAPE = (2, 3, 3)
Change = Callable[[Image, Op], Image]


class Field:
    """A velocity field `0.3 x + t + b`, with `b` from the conditioning."""

    name, row_invariant, takes_velocity, guided_channels = "field", True, False, None

    def __init__(self, row_counts: tuple[int, ...] | None = None) -> None:
        self.row_counts = row_counts

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        return 0.3 * latents + timestep.view(-1, 1, 1, 1) / 1000 + conditioning["bias"].view(-1, 1, 1, 1)


class Refiner(Field):
    """A change of velocity `0.1 x - 0.2 c + t + b`."""

    name, takes_velocity = "refiner", True

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        x, c = latents.chunk(2, dim=1)
        return super().__call__(x / 3, timestep, conditioning) - 0.2 * c


class Watched(Field):
    """Records the timesteps of every call, and breaks at a certain text."""

    def __init__(self, row_counts: tuple[int, ...] | None = None) -> None:
        super().__init__(row_counts)
        self.calls: list[Tensor] = []

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        self.calls.append(timestep.clone())
        if (conditioning["bias"] == 666).any():
            raise RuntimeError("cursed row")
        return super().__call__(latents, timestep, conditioning)


FLOW = FlowSpec(evaluates_data=True, refiner=RefinerSpec(max_step=1.0))
EAGER = CompiledStep("eager")
# As on a GPU, where the launch is a CUDA graph: with tensors that stay, of which a step is a copy.
KEPT = CompiledStep(None, capture=lambda launch: launch)
BIAS = {Role.NEGATIVE: -0.25, Role.SOURCE: 0.125}


def networks(row_counts: tuple[int, ...] | None = None) -> dict[str, Field]:
    return {"base": Field(row_counts), "refiner": Refiner(row_counts)}


def texts(bias: float) -> dict[Role, dict[str, Tensor]]:
    return {role: {"bias": torch.tensor([value])} for role, value in ({Role.TARGET: bias} | BIAS).items()}


def image(
    handle: int,
    *,
    steps: int | None = 3,
    guidance: Guidance | float = 1.0,
    sampler: str = "euler",
    strength: float | None = None,
    bias: float = 0.5,
    shape: tuple[int, ...] = SHAPE,
    **more: object,
) -> Image:
    wanted = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    program = compile_sampler(sampler, SamplerRequest(steps, wanted, strength), FLOW)
    source = None if strength is None else initial_noise(1000 + handle, shape)
    fields = {
        "program": program,
        "noise": initial_noise(handle, shape),
        "conditioning": texts(bias),
        "source": source,
        "seed": handle,
        **more,
    }
    return Image(handle, **fields)  # type: ignore[arg-type]


def alone(spec: Image, *, previews: list[np.ndarray] | None = None) -> Tensor:
    """What the definition of programs gives for the image, in float64."""

    def base(y: np.ndarray, timestep: float, role: Role) -> np.ndarray:
        return 0.3 * y + timestep / 1000 + spec.conditioning[role]["bias"].item()

    final = run_program(
        spec.program,
        base,
        spec.noise.double().numpy(),
        source=None if spec.source is None else spec.source.double().numpy(),
        mask=None if spec.mask is None else spec.mask.double().numpy(),
        refiner=lambda y, c, timestep, role: base(y / 3, timestep, role) - 0.2 * c,
        draw=lambda number: drawn_noise(spec.seed, number, tuple(spec.noise.shape)).double().numpy(),
        previews=previews,
    )
    return torch.from_numpy(final)


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


SAMPLERS = (
    *(("euler", 1), ("euler", 4), ("euler", 9), ("heun", 3), ("midpoint", 2), ("fireflow", 5), ("pseudo", 4)),
    *(("H1P5R3", None), ("H2P4R2", None), ("E1R2M1", None), ("instaflow", 1), ("euler-sde[eta=0.5]", 4)),
    *(("perflow[windows=3]", 7), ("flowedit[source_guidance=2]", 5), ("flowedit[last_plain=2]", 4)),
)
MIX = st.tuples(
    st.sampled_from(SAMPLERS),
    st.sampled_from([0.0, 1.0, 1.5, 7.5, Guidance(3.0, start_sigma=0.7, end_sigma=0.2)]),
    st.sampled_from([None, 0.5, 1.0]),
    st.booleans(),
)


def mixed(handle: int, case: tuple[tuple[str, int | None], Guidance | float, float | None, bool]) -> Image:
    (sampler, steps), guidance, strength, masked = case
    if sampler.startswith("flowedit"):
        strength = strength or 0.75
    if steps == 1 and strength:
        strength = 1.0
    mask = torch.arange(9.0).view(3, 3) / 8 if masked and strength else None
    wanted = {"sampler": sampler, "steps": steps, "guidance": guidance, "strength": strength, "mask": mask}
    return image(handle, bias=0.1 * handle, **wanted)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(st.lists(MIX, min_size=1, max_size=12), st.integers(1, 6), st.sampled_from([None, (4,), (1, 2, 8)]))
def test_any_mix_gives_every_image_what_it_gets_alone(
    cases: list[tuple[tuple[str, int | None], Guidance | float, float | None, bool]],
    capacity: int,
    row_counts: tuple[int, ...] | None,
) -> None:
    images = [mixed(handle, case) for handle, case in enumerate(cases)]
    done = drive(Engine(networks(row_counts), capacity=capacity), list(images))
    assert done.keys() == {spec.handle for spec in images}
    for spec in images:
        torch.testing.assert_close(done[spec.handle].double(), alone(spec), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "heun", "fireflow", "H2P4R1", "euler-sde", "perflow"])
def test_float64_state_reproduces_the_definition_to_rounding(sampler: str) -> None:
    spec = image(1, steps=7, sampler=sampler, guidance=3.0, noise=initial_noise(1, SHAPE).double())
    engine = Engine(networks(), capacity=1, dtype=torch.float64)
    engine.admit(spec)
    table = next(iter(engine._tables.values()))
    while len(engine):
        latents = table.latents[0]
        engine.tick()
    torch.testing.assert_close(latents, alone(spec), rtol=0, atol=1e-13)


def test_images_at_different_timesteps_share_one_network_call() -> None:
    field = Watched()
    engine = Engine({"base": field}, capacity=4)
    engine.admit(image(0, steps=4))
    engine.tick()
    engine.admit(image(1, steps=2))
    report = engine.tick()
    assert field.calls[-1].tolist() == [750.0, 1000.0]
    assert report.timesteps == [750.0, 1000.0]
    assert (report.calls, report.rows) == (1, 2)


def test_unguided_images_cost_one_row_and_guided_ones_two() -> None:
    engine = Engine({"base": Field((8,))}, capacity=4)
    engine.admit(image(0))
    engine.admit(image(1, guidance=2.0))
    report = engine.tick()
    assert (report.rows, report.padded_rows) == (3, 8)


def test_sizes_run_side_by_side() -> None:
    images = [image(0), image(1, shape=(2, 5, 3)), image(2, steps=5, shape=(2, 5, 3))]
    done = drive(Engine({"base": Field()}, capacity=3), list(images))
    for spec in images:
        torch.testing.assert_close(done[spec.handle].double(), alone(spec), rtol=1e-5, atol=1e-6)


def test_inpainting_keeps_what_is_outside_the_mask() -> None:
    mask = torch.zeros(SHAPE[1:])
    mask[0] = 1
    for sampler, steps in (("euler", 6), ("H1P3R2", None), ("flowedit", 6), ("perflow", 5)):
        masked = image(3, steps=steps, sampler=sampler, strength=1.0, mask=mask)
        done = drive(Engine(networks(), capacity=2), [masked, image(4, steps=6)])
        assert masked.source is not None
        torch.testing.assert_close(done[3][:, 1:], masked.source[:, 1:])
        torch.testing.assert_close(done[3].double(), alone(masked), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("step", [EAGER, CompiledStep("inductor"), KEPT], ids=["eager", "inductor", "kept"])
def test_compiled_steps_give_what_the_definition_gives(step: StepFunction) -> None:
    specs = [
        image(0, steps=3, guidance=2.0),
        image(1, steps=3),
        image(2, sampler="H1R1", steps=None),
        image(3, sampler="heun", strength=1.0, steps=2, mask=torch.eye(3), preview_interval=1),
        image(4, sampler="flowedit", strength=1.0, steps=2),
        image(5, sampler="flowedit", strength=1.0, steps=2, mask=torch.full((3, 3), 0.5)),
    ]
    engine = Engine(networks((2, 4, 8)), capacity=3, step=step)
    done = drive(engine, list(specs))
    for spec in specs:
        torch.testing.assert_close(done[spec.handle].double(), alone(spec), rtol=1e-4, atol=1e-4)


def test_a_sealed_step_compiles_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    step = CompiledStep("eager")
    drive(Engine(networks((2,)), capacity=2, step=step), [image(0, steps=1)])
    step.seal()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("images under way would wait"))
    spec = image(1, steps=2, mask=torch.eye(3), strength=1.0)
    done = drive(Engine(networks((2,)), capacity=2, step=step), [spec])
    torch.testing.assert_close(done[1].double(), alone(spec), rtol=1e-4, atol=1e-4)


def test_slots_are_grouped_by_network() -> None:
    engine = Engine(networks(), capacity=3)
    engine.admit(image(0, sampler="H1R2", steps=None))
    engine.tick()
    engine.tick()
    engine.admit(image(1))
    report = engine.tick()
    assert (report.calls, report.rows) == (2, 2)
    assert sorted(report.timesteps) == pytest.approx([2000 / 3, 1000])


def test_draws_depend_on_the_seed_alone() -> None:
    def run(*others: Image) -> Tensor:
        return drive(Engine(networks(), capacity=2), [image(7, sampler="euler-sde"), *others])[7]

    assert torch.equal(run(), run(image(8, sampler="euler-sde", steps=5)))


def change_to(*, guidance: float = 1.0, bias: float = 0.5, sampler: str = "euler", steps: int = 4) -> Change:
    def change(old: Image, op: Op) -> Image:
        request = SamplerRequest(steps, Guidance(guidance), resume_at=op.step)
        return replace(old, program=compile_sampler(sampler, request, FLOW), conditioning=texts(bias))

    return change


@pytest.mark.parametrize("sampler", ["euler", "heun", "pseudo", "fireflow"])
@pytest.mark.parametrize("ticks", [1, 2, 3])
def test_a_change_under_way_goes_on_from_the_latents_without_the_old_velocity(sampler: str, ticks: int) -> None:
    engine = Engine(networks(), capacity=2)
    engine.admit(image(0, steps=4, sampler=sampler))
    table = next(iter(engine._tables.values()))
    for _ in range(ticks):
        engine.tick()
    engine.change(0, change_to(guidance=2.0, bias=0.9, sampler=sampler))
    _, slot = engine._slots[0]
    latents = table.latents[slot.row].clone()
    # A velocity of other texts must not be used: were it, this would show.
    table.velocity[slot.row] = 1e6
    rest = replace(image(0), program=replace(slot.image.program, start_n=1.0), conditioning=texts(0.9), noise=latents)
    reports = [engine.tick() for _ in range(len(slot.image.program))]
    torch.testing.assert_close(torch.from_numpy(reports[-1].retired[0]).double(), alone(rest), rtol=1e-5, atol=1e-5)
    assert [report.progress[0].step for report in reports] == list(range(ticks + 1, ticks + len(reports) + 1))
    assert {report.progress[0].steps for report in reports} == {ticks + len(reports)}


def test_a_change_of_strength_starts_again_from_the_source() -> None:
    engine = Engine(networks(), capacity=1)
    engine.admit(image(0, steps=8, strength=1.0))
    engine.tick()
    stronger = image(0, steps=8, strength=0.5)
    engine.change(0, lambda old, op: stronger, restart=True)
    done = drive(engine, [])
    torch.testing.assert_close(done[0].double(), alone(stronger), rtol=1e-5, atol=1e-6)


def test_a_change_that_cannot_be_made_leaves_the_image_as_it_was() -> None:
    engine = Engine({"base": Field()}, capacity=1)
    spec = image(0, steps=4)
    engine.admit(spec)
    engine.tick()
    for bad in (image(0, shape=(2, 5, 5)), image(1), image(0, sampler="H1R1", steps=None)):
        with pytest.raises(ValueError, match=r"keep the handle|refiner"):
            engine.change(0, lambda old, op, bad=bad: bad)  # type: ignore[misc]
    with pytest.raises(KeyError):
        engine.change(5, lambda old, op: old)
    torch.testing.assert_close(drive(engine, [])[0].double(), alone(spec), rtol=1e-5, atol=1e-6)


def test_a_change_that_breaks_half_way_leaves_the_image_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    engine = Engine({"base": Field()}, capacity=1)
    spec = image(0, steps=4, sampler="fireflow")
    engine.admit(spec)
    engine.tick()
    table = next(iter(engine._tables.values()))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", no_memory)
        longer = image(0, steps=len(table.programs[0]) + 1, bias=9.0, noise=torch.ones(SHAPE), strength=1.0)
        with pytest.raises(torch.OutOfMemoryError):
            engine.change(0, lambda old, op: longer)
    torch.testing.assert_close(drive(engine, [])[0].double(), alone(spec), rtol=1e-5, atol=1e-6)


def test_what_a_network_refuses_is_told_as_it_was_said() -> None:
    class SmallOnly(Field):
        def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
            raise InvalidRequestError("shape", "9x9", "the sizes for which it was built", "build more")

    engine = Engine({"base": SmallOnly()}, capacity=1)
    engine.admit(image(0))
    assert str(engine.tick().failed[0]) == "shape: got '9x9'; allowed: the sizes for which it was built; build more"


def test_only_the_guilty_image_fails() -> None:
    engine = Engine({"base": Watched()}, capacity=4)
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


@pytest.mark.parametrize("ticks", [1, 3])
@pytest.mark.parametrize(("sampler", "steps"), SAMPLERS)
def test_another_engine_goes_on_where_one_was_suspended(sampler: str, steps: int | None, ticks: int) -> None:
    case = (sampler, steps), 2.0, None, True
    whole = drive(Engine(networks(), capacity=2), [mixed(0, case)])[0]
    engine = Engine(networks(), capacity=2)
    engine.admit(mixed(0, case))
    for _ in range(ticks):
        engine.tick()
    if not len(engine):
        return  # it is that short
    states = engine.suspend()
    engine.check_integrity()
    assert len(engine) == 0
    rest = Engine(networks(), capacity=2)
    # In a row that somebody else has left.
    drive(rest, [image(7, bias=9.0)])
    rest.admit(replace(mixed(0, case), resume=states[0]))
    reports = [rest.tick() for _ in range(len(mixed(0, case).program) - ticks)]
    assert torch.equal(torch.from_numpy(reports[-1].retired[0]), whole)
    assert [report.progress[0].step for report in reports] == list(range(ticks + 1, ticks + len(reports) + 1))


def test_previews_come_after_whole_steps_and_not_at_the_end() -> None:
    for sampler, expected in (("euler", [2, 4]), ("heun", [4, 8]), ("pseudo", [3, 5])):
        engine = Engine(networks(), capacity=1)
        engine.admit(image(0, steps=6, sampler=sampler, preview_interval=2))
        steps = []
        while len(engine):
            steps += [preview.step for preview in engine.tick().previews]
        assert steps == expected


def previews_of(engine: Engine, *, ticks: int = 1000) -> list[int]:
    steps: list[int] = []
    while len(engine) and (ticks := ticks - 1) >= 0:
        steps += [preview.step for preview in engine.tick().previews]
    return steps


def test_previews_keep_their_cadence_through_changes_and_on_another_engine() -> None:
    spec = image(0, steps=12, preview_interval=5)
    first = Engine(networks(), capacity=1)
    first.admit(spec)
    assert previews_of(first, ticks=3) == []
    second = Engine(networks(), capacity=1)
    second.admit(replace(spec, resume=first.suspend()[0]))
    assert previews_of(second, ticks=5) == [5]

    def change(old: Image, op: Op) -> Image:
        return replace(change_to(steps=12)(old, op), resume=None)

    second.change(0, change)
    assert previews_of(second) == [10]


def test_previews_are_counted_from_a_new_start() -> None:
    engine = Engine(networks(), capacity=1)
    engine.admit(image(0, steps=12, strength=1.0, preview_interval=5))
    assert previews_of(engine, ticks=3) == []
    later = image(0, steps=12, strength=0.75, preview_interval=5)
    engine.change(0, lambda old, op: later, restart=True)
    # Three evaluations that are void now, then five of the new nine.
    assert previews_of(engine) == [8]


@pytest.mark.parametrize("sampler", ["H1P1R2", "flowedit"])
def test_a_preview_is_what_the_program_expects(sampler: str) -> None:
    spec = image(0, sampler=sampler, steps=4, strength=1.0, preview_interval=1)
    expected: list[np.ndarray] = []
    alone(spec, previews=expected)
    engine = Engine(networks(), capacity=1)
    engine.admit(spec)
    previews = [preview for _ in spec.program.ops for preview in engine.tick().previews]
    assert len(previews) == 3
    for preview in previews:
        np.testing.assert_allclose(preview.latents, expected[preview.step - 1], rtol=1e-4, atol=1e-4)


def test_admission_refuses_what_cannot_run() -> None:
    engine = Engine({"base": Field()}, capacity=1)
    with pytest.raises(ValueError, match="refiner"):
        engine.admit(image(0, sampler="H1R1", steps=None))
    with pytest.raises(ValueError, match="negative"):
        engine.admit(image(0, guidance=2.0, conditioning={Role.TARGET: {"bias": torch.tensor([0.0])}}))
    for place in (SlotState(np.zeros(SHAPE), np.zeros(SHAPE), 3, 3), SlotState(np.zeros(SHAPE), np.zeros(SHAPE), 1, 4)):
        with pytest.raises(ValueError, match="cannot go on"):
            engine.admit(image(0, steps=3, resume=place))
    engine.admit(image(0))
    with pytest.raises(ValueError, match="in use"):
        engine.admit(image(1))
    engine.check_integrity()


def test_residual_guidance_runs_beside_others() -> None:
    specs = [
        image(k, guidance=Guidance(2.0, mode=mode, residual=0.7), strength=strength, steps=4)
        for k, (mode, strength) in enumerate([(m, s) for m in GuidanceMode for s in (None, 0.5)])
    ]
    done = drive(Engine(networks(), capacity=4), list(specs))
    for spec in specs:
        torch.testing.assert_close(done[spec.handle].double(), alone(spec), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("step", [run_step, EAGER, KEPT], ids=["plain", "compiled", "kept"])
def test_many_sizes_do_not_fill_the_memory(step: StepFunction) -> None:
    engine = Engine({"base": Field((1,))}, capacity=1, step=step)
    alive: WeakSet[SlotTable] = WeakSet()
    for width in range(1, MAX_LAYOUTS + 4):
        drive(engine, [image(width, steps=1, shape=(2, 3, width))])
        alive.update(engine._tables.values())
    gc.collect()
    assert len(engine._tables) == len(alive) == MAX_LAYOUTS


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("step", [EAGER, KEPT], ids=["compiled", "kept"])
def test_a_compiled_step_goes_on_where_programs_outgrow_their_table(step: StepFunction) -> None:
    engine = Engine({"base": Field((1,))}, capacity=1, step=step)
    for steps in (8, 40, 100):
        spec = image(0, steps=steps)
        torch.testing.assert_close(drive(engine, [spec])[0].double(), alone(spec), rtol=1e-4, atol=1e-4)
