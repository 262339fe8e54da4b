"""Requests that give their time in place of their steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from gateway.admission import work_if_it_runs
from gateway.budget import Choice, choices, choose
from streamflow.errors import InvalidRequestError
from streamflow.flow.spec import FlowSpec, RefinerSpec, WindowSpec
from streamflow.types import DecoderKind
from streamflow.v1 import gateway_pb2, types_pb2
from tests.cards import CARD

REFINED = replace(
    CARD, flow=FlowSpec(refiner=RefinerSpec(max_step=0.25)), decoders=(DecoderKind.TINY, DecoderKind.FULL)
)


def request(**fields: Any) -> types_pb2.GenerateRequest:
    return types_pb2.GenerateRequest(**{"prompts": ["a blue star"], "time_budget_s": 2.0, **fields})


def test_choices_are_the_samplers_that_are_best_at_their_cost() -> None:
    assert choices(request(), REFINED)[:4] == [
        Choice("euler", 1),
        Choice("euler", 2),
        Choice("pseudo", 3),
        Choice("H1P1R2", 4),
    ]
    assert choices(request(min_steps=7), CARD) == [Choice("pseudo", steps) for steps in (7, 8, 10, 12, 16, 20, 25)]
    assert {choice.sampler for choice in choices(request(sampler="heun"), CARD)} == {"heun"}
    assert choices(request(sampler="H1P2R2"), REFINED) == [Choice("H1P2R2", 5)]
    piecewise = replace(CARD, default_sampler="perflow", flow=FlowSpec(windows=WindowSpec(windows=4)))
    assert choices(request(), piecewise)[0] == Choice("perflow", 4)


def test_the_most_that_fits_is_chosen() -> None:
    found = [Choice("euler", steps) for steps in (1, 2, 4, 8)]
    assert choose(found, [0.1, 0.2, 0.4, 0.8], budget_s=0.5, card=REFINED) == (found[2], None)
    assert choose(found, [0.1, 0.2, 0.4, 0.8], budget_s=1.0, card=REFINED) == (found[3], None)
    assert choose(found, [0.1, 0.2, 0.4, 0.8], budget_s=2.0, card=REFINED) == (found[3], DecoderKind.FULL)
    assert choose(found, [0.1, 0.2, 0.4, 0.8], budget_s=2.0, card=CARD) == (found[3], None)
    # Nothing fits: the least, which admission may refuse. Nothing is known: the least, which then is measured.
    assert choose(found, [1.0, 2.0, 4.0, 8.0], budget_s=0.5, card=REFINED) == (found[0], None)
    assert choose(found, [None] * 4, budget_s=0.5, card=REFINED) == (found[0], None)


async def test_what_has_never_been_measured_begins_with_the_least(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    deployment.start_worker()
    told = await events(gateway, request(time_budget_s=20.0))
    assert (told[0].accepted.sampler, told[0].accepted.steps) == ("euler", 1)
    # It ended, so there is something to go by.
    again = await events(gateway, request(time_budget_s=20.0))
    assert again[0].accepted.steps > 1


@pytest.mark.parametrize("card", [CARD, REFINED], ids=["plain", "refined"])
def test_the_residual_modes_have_the_sampler_that_knows_them(card):
    guidance = types_pb2.GuidanceOptions(mode=types_pb2.GUIDANCE_MODE_SELF_NEGATIVE)
    assert {choice.sampler for choice in choices(request(guidance=guidance), card)} == {"euler"}
    # Where nothing is guided there is no mode either.
    unguided = request(guidance=guidance, guidance_scale=1.0)
    assert choices(unguided, card) == choices(request(guidance_scale=1.0), card)


async def test_a_budget_with_a_residual_mode_is_served(deploy):
    gateway = await deploy().gateway()
    guidance = types_pb2.GuidanceOptions(mode=types_pb2.GUIDANCE_MODE_ONETIME_NEGATIVE)
    assert (await gateway.stub.Submit(request(guidance=guidance))).request_id


@pytest.mark.parametrize("card", [CARD, REFINED], ids=["plain", "refined"])
@pytest.mark.parametrize("residual", [False, True])
def test_the_most_steps_can_run_if_any_can(card, residual):
    mode = types_pb2.GUIDANCE_MODE_SELF_NEGATIVE if residual else types_pb2.GUIDANCE_MODE_FULL
    guidance = types_pb2.GuidanceOptions(mode=mode)
    for percent in range(1, 101):
        asked = request(init_image=b"png", strength=percent / 100, guidance=guidance)
        runs = [work_if_it_runs(choice.apply(asked, None), card) is not None for choice in choices(asked, card)]
        assert runs[-1] is any(runs), percent


def test_a_notation_has_the_least_steps_or_is_refused():
    assert choices(request(sampler="H1P4", min_steps=5), CARD) == [Choice("H1P4", 5)]
    with pytest.raises(InvalidRequestError, match="min_steps: got 6; allowed: at most 5 with the sampler H1P4"):
        choices(request(sampler="H1P4", min_steps=6), CARD)


async def events(gateway: Any, asked: types_pb2.GenerateRequest) -> list[gateway_pb2.GenerateEvent]:
    return [event async for event in gateway.stub.Generate(asked)]


async def test_what_was_chosen_is_reported(deploy, monkeypatch):
    deployment = deploy()
    gateway = await deployment.gateway()
    deployment.start_worker()
    expected = {}

    async def expected_s(works, *, num_images):
        expected.update({work: 0.1 * work * num_images for work in works})
        return list(expected.values())

    monkeypatch.setattr(deployment.transport, "expected_s", expected_s)
    told = await events(gateway, request(time_budget_s=2.0, guidance_scale=1.0, num_images=2, request_id="b"))
    accepted = told[0].accepted
    # 2 s are 1.6 s with room to be wrong: 8 evaluations for two images, which is 6 steps of the pseudo corrector.
    assert (accepted.sampler, accepted.steps) == ("pseudo", 6)
    assert accepted.decoder == types_pb2.DECODER_KIND_TINY
    job = await gateway.stub.GetJob(gateway_pb2.GetJobRequest(request_id="b"))
    assert job.deadline_at_s - job.admitted_at_s == pytest.approx(2.0, abs=0.01)
    # Sent again it is the same request, whatever would be chosen now.
    expected.clear()
    again = await events(gateway, request(time_budget_s=2.0, guidance_scale=1.0, num_images=2, request_id="b"))
    assert again[0].accepted.attached
    assert again[0].accepted.steps == 6


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"time_budget_s": 0.0}, "time_budget_s"),
        ({"time_budget_s": -1.0}, "time_budget_s"),
        ({"time_budget_s": float("nan")}, "time_budget_s"),
        ({"time_budget_s": float("inf")}, "time_budget_s"),
        ({"time_budget_s": 1e6}, "time_budget_s"),
        ({"steps": 4}, "steps"),
        ({"min_steps": 0}, "min_steps"),
        ({"min_steps": 2**31}, "min_steps"),
        ({"sampler": "no-such"}, "sampler"),
        ({"prompts": []}, "prompts"),
    ],
)
async def test_budgets_that_cannot_be_kept_are_refused(deploy, fields, field):
    gateway = await deploy().gateway()
    with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: got") as refusal:
        await gateway.stub.Submit(request(**fields))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_min_steps_alone_is_refused(deploy):
    gateway = await deploy().gateway()
    with pytest.raises(grpc.aio.AioRpcError, match="min_steps: got 3; allowed: only with time_budget_s"):
        await gateway.stub.Submit(types_pb2.GenerateRequest(prompts=["a"], min_steps=3))
