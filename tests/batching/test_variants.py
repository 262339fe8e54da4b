"""Images with other weights, other inputs, and guidance on some channels, in one running batch."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from streamflow.batching.compiled import CompiledStep
from streamflow.batching.engine import Engine
from streamflow.batching.slots import Image
from streamflow.batching.step import StepFunction, run_step
from streamflow.flow.guidance import Guidance
from streamflow.flow.noise import initial_noise
from streamflow.flow.programs import Role
from streamflow.flow.samplers import SamplerRequest, compile_sampler
from streamflow.flow.spec import FlowSpec
from streamflow.types import PLAIN, AdapterUse, Variant

FLOW = FlowSpec(evaluates_data=True)
INK, WASH = (Variant((AdapterUse(name, 0.5),)) for name in ("ink", "wash"))
KEPT = CompiledStep(None, capture=lambda launch: launch)


class Field:
    """A velocity `gain x + t + bias + size`: the bias is the text's, the size the image's."""

    name, row_invariant, takes_velocity, row_counts = "field", True, False, None

    def __init__(self, gain: float, *, guided_channels: int | None = None) -> None:
        self.gain, self.guided_channels = gain, guided_channels
        self.rows: list[int] = []

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        self.rows.append(len(latents))
        told = conditioning["bias"] + conditioning["size"]
        return self.gain * latents + (timestep / 1000 + told).view(-1, 1, 1, 1)


def image(handle: int, variant: Variant = PLAIN, *, guidance: float = 1.0, size: float = 0.0) -> Image:
    return Image(
        handle,
        program=compile_sampler("euler", SamplerRequest(3, Guidance(guidance)), FLOW),
        noise=initial_noise(handle, (4, 2, 2)),
        conditioning={role: {"bias": torch.tensor(0.1 * role)} for role in Role},
        variant=variant,
        inputs={"size": torch.tensor(size)},
    )


def expected(one: Image, gain: float, *, guidance: float = 1.0, guided_channels: int = 4) -> Tensor:
    """Three Euler steps from 1 to 0, written out."""
    x = one.noise.double()
    for sigma in (1.0, 2 / 3, 1 / 3):
        target, negative = (
            gain * x + sigma + one.conditioning[role]["bias"] + one.inputs["size"]
            for role in (Role.TARGET, Role.NEGATIVE)
        )
        guided = negative + guidance * (target - negative) if guidance > 1 else target
        x = x - torch.cat([guided[:guided_channels], target[guided_channels:]]) / 3
    return x.float()


def run(engine: Engine, images: list[Image]) -> dict[object, Tensor]:
    for one in images:
        engine.admit(one)
    finished: dict[object, Tensor] = {}
    while len(engine):
        report = engine.tick()
        assert not report.failed
        finished |= {handle: torch.from_numpy(latents) for handle, latents in report.retired.items()}
    return finished


@pytest.mark.parametrize("step", [run_step, KEPT])
def test_variants_run_side_by_side_and_share_no_call(step: StepFunction) -> None:
    gains = {PLAIN: 0.3, INK: -0.2, WASH: 0.9}
    networks = {variant: Field(gain) for variant, gain in gains.items()}
    engine = Engine(
        {"base": networks[PLAIN]}, capacity=8, step=step, variant_of=lambda name, variant: networks[variant]
    )
    images = [image(k, [PLAIN, INK, WASH, INK][k % 4], guidance=1.0 + 2 * (k % 2), size=0.1 * k) for k in range(8)]
    finished = run(engine, images)
    for k, one in enumerate(images):
        wanted = expected(one, gains[one.variant], guidance=1.0 + 2 * (k % 2))
        torch.testing.assert_close(finished[k], wanted, rtol=1e-5, atol=1e-5)
    # Two plain images without guidance, four with ink and guidance, two with wash and without.
    assert [set(network.rows) for network in networks.values()] == [{2}, {8}, {2}]


def test_a_variant_that_cannot_be_made_costs_its_own_images_only() -> None:
    def variant_of(name: str, variant: Variant) -> Field:
        raise MemoryError("no room for it")

    engine = Engine({"base": Field(0.3)}, capacity=4, variant_of=variant_of)
    for one in (plain := image(0), image(1, INK)):
        engine.admit(one)
    failed, finished = {}, {}
    while len(engine):
        report = engine.tick()
        failed |= report.failed
        finished |= report.retired
    assert set(failed) == {1}
    torch.testing.assert_close(torch.from_numpy(finished[0]), expected(plain, 0.3), rtol=1e-5, atol=1e-5)


def test_an_engine_without_variants_refuses_them() -> None:
    with pytest.raises(ValueError, match="ink"):
        Engine({"base": Field(0.3)}, capacity=1).admit(image(0, INK))


@pytest.mark.parametrize("step", [run_step, KEPT])
@pytest.mark.parametrize("channels", [1, 3])
def test_guidance_may_act_on_the_first_channels_only(channels: int, step: StepFunction) -> None:
    engine = Engine({"base": Field(0.3, guided_channels=channels)}, capacity=2, step=step)
    one, beside = image(0, guidance=4.0), image(1)
    finished = run(engine, [one, beside])
    wanted = expected(one, 0.3, guidance=4.0, guided_channels=channels)
    torch.testing.assert_close(finished[0], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(finished[1], expected(beside, 0.3), rtol=1e-5, atol=1e-5)


def test_a_step_forgets_what_it_made_for_a_network_that_went() -> None:
    step, network = CompiledStep(None, capture=lambda launch: launch), Field(0.3)
    engine = Engine({"base": network}, capacity=2, step=step)
    run(engine, [image(0)])
    (callables,) = step._callables.values()
    assert callables
    step.forget(network)
    assert not callables
