"""Several models behind one gateway: each request finds its model, and calls that name none find the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
import pytest

from streamflow.errors import AlreadyExistsError, InvalidRequestError, NotFoundError
from streamflow.rpc.channels import key_metadata
from streamflow.rpc.errors import from_rpc_error
from streamflow.transport.policy import Policy
from streamflow.types import Stage, WorkerInfo
from streamflow.v1 import gateway_pb2, types_pb2
from tests.gateway.conftest import KEYS, Deployment, Gateway
from tests.gateway.test_gateway_dead import given_up

pytestmark = pytest.mark.timeout(60)

ALICE, BOB = key_metadata("key-alice"), key_metadata("key-bob")
ONCE = Policy(max_deliveries=1, retry_s=0.0)
FULL = [
    WorkerInfo(f"{stage}-1", stage, "127.0.0.1:9", "any", "r1", "torch-eager", "cpu", 8, started_at_s=1.0)
    for stage in Stage
]


@dataclass
class Two:
    """A gateway for two models: "shapes", the default, and "rings"."""

    gateway: Gateway
    shapes: Deployment
    rings: Deployment

    @property
    def stub(self) -> Any:
        return self.gateway.stub

    async def models(self) -> dict[str, bool]:
        """Which are live."""
        answer = await self.stub.ListModels(gateway_pb2.ListModelsRequest())
        return {model.name: model.live for model in answer.models}


@pytest.fixture
def two(deploy: Callable[..., Deployment]) -> Callable[..., Any]:
    async def start(*, policy: Policy | None = None, limits: dict[str, int] | None = None, **options: Any) -> Two:
        shapes, rings = (deploy(policy=policy, **(limits or {})) for _ in range(2))
        return Two(await shapes.gateway(more={"rings": rings}, **options), shapes, rings)

    return start


def request(request_id: str = "", **fields: object) -> types_pb2.GenerateRequest:
    return types_pb2.GenerateRequest(request_id=request_id, **{"prompts": ["a red ring"], **fields})


def job(request_id: str) -> gateway_pb2.GetJobRequest:
    return gateway_pb2.GetJobRequest(request_id=request_id)


async def refused(call: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def ids(deployment: Deployment, tenant: str = "") -> list[str]:
    return [view.id.rpartition("~")[2] for view in await deployment.transport.jobs(tenant=tenant)]


async def test_a_request_is_made_by_its_model(two):
    served = await two()
    workers = {"shapes": served.shapes.start_worker(), "rings": served.rings.start_worker()}
    for name, model in (("none", ""), ("shapes", "shapes"), ("rings", "rings")):
        events = [event async for event in served.stub.Generate(request(name, model=model))]
        assert events[0].accepted.model == (model or "shapes")
        assert events[-1].done.state == types_pb2.JOB_STATE_IMAGES
    assert len((await served.stub.GenerateImages(request("answer", model="rings"))).images) == 1
    made = {name: [spec.request.request_id for spec in worker.specs] for name, worker in workers.items()}
    assert made == {"shapes": ["none", "shapes"], "rings": ["rings", "answer"]}
    assert {spec.request.model for spec in workers["rings"].specs} == {"rings"}


async def test_an_unknown_model_is_told_of_all_that_there_are(two):
    served = await two()
    for call in (served.stub.Submit, served.stub.GenerateImages):
        error = await refused(call(request("r-1", model="squares")))
        assert isinstance(error, InvalidRequestError)
        assert "model: got 'squares'; allowed: one of shapes, rings" in str(error)
    assert await ids(served.shapes) == await ids(served.rings) == []


async def test_calls_that_name_a_job_alone_find_it(two):
    served = await two(keys=KEYS)
    worker = served.rings.start_worker(open_gate=False)
    for name, model in (("here", "shapes"), ("there", "rings"), ("left", "rings")):
        submitted = await served.stub.Submit(request(name, model=model), metadata=ALICE)
        found = await served.stub.GetJob(job(name), metadata=ALICE)
        assert (found.request_id, found.model) == (submitted.request_id, submitted.model) == (name, model)
    cancelled = await served.stub.Cancel(gateway_pb2.CancelRequest(request_id="left"), metadata=ALICE)
    assert cancelled.state == types_pb2.JOB_STATE_CANCELLED
    watch = served.stub.Watch(gateway_pb2.WatchRequest(request_id="there"), metadata=ALICE)
    worker.gate.set()
    events = [event async for event in watch]
    assert events[0].accepted.model == "rings"
    assert events[-1].done.state == types_pb2.JOB_STATE_IMAGES
    for name, tenant in (("nowhere", ALICE), ("there", BOB)):
        error = await refused(served.stub.GetJob(job(name), metadata=tenant))
        assert isinstance(error, NotFoundError)
        assert name in str(error)


async def test_an_id_that_another_model_uses_is_taken(two):
    served = await two(keys=KEYS)
    await served.stub.Submit(request("mine", model="rings", seed=1), metadata=ALICE)
    error = await refused(served.stub.Submit(request("mine", seed=1), metadata=ALICE))
    assert isinstance(error, AlreadyExistsError)
    assert "a request to the model rings has the id 'mine' already" in str(error)
    assert await ids(served.shapes, "alice") == []
    # The same request attaches, and the id is free for others.
    again = await served.stub.Submit(request("mine", model="rings", seed=1), metadata=ALICE)
    assert (again.model, await ids(served.rings, "alice")) == ("rings", ["mine"])
    assert (await served.stub.Submit(request("mine"), metadata=BOB)).model == "shapes"


async def test_jobs_of_all_are_listed_newest_first_page_by_page(two):
    served = await two()
    order = ["shapes", "rings", "rings", "shapes", "rings", "rings", "rings"]
    for number, model in enumerate(order):
        await served.stub.Submit(request(f"r-{number}", model=model))
    newest = [(f"r-{number}", model) for number, model in reversed(list(enumerate(order)))]
    for size in (1, 2, 3, 7, 8):
        pages, token = [], ""
        while token or not pages:
            page = await served.stub.ListJobs(gateway_pb2.ListJobsRequest(page_size=size, page_token=token))
            pages.append([(each.request_id, each.model) for each in page.jobs])
            token = page.next_page_token
        assert [one for page in pages for one in page] == newest
        assert [len(page) for page in pages] == [size] * (7 // size) + ([7 % size] if 7 % size else [])


async def test_a_limit_is_that_of_each_model(two):
    served = await two(limits={"max_jobs": 1})
    await served.stub.Submit(request())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.stub.Submit(request())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await served.stub.Submit(request(model="rings"))).model == "rings"


async def test_dead_letters_of_all_are_listed_and_retried_by_their_model(two):
    served = await two(policy=ONCE)
    letters = [
        await given_up(deployment, served.gateway, request_id=name, model=model)
        for deployment, name, model in (
            (served.rings, "first", "rings"),
            (served.shapes, "second", "shapes"),
            (served.rings, "third", "rings"),
        )
    ]
    for limit in (2, 3):
        listed = await served.stub.ListDeadLetters(gateway_pb2.ListDeadLettersRequest(limit=limit))
        newest = [(letter.request_id, letter.request.model) for letter in listed.letters]
        assert newest == [("third", "rings"), ("second", "shapes"), ("first", "rings")][:limit]
    # In memory letters are counted from 1, so that those of two models have the same numbers.
    for letter in (letters[0], letters[0], letters[1]):
        retried = await served.stub.RetryDeadLetter(gateway_pb2.RetryDeadLetterRequest(id=letter.id))
        assert (retried.request_id, retried.model) == (f"retry-{letter.id}", letter.request.model)
        found = await served.stub.GetJob(job(retried.request_id))
        assert found.model == letter.request.model
    left = await served.stub.ListDeadLetters(gateway_pb2.ListDeadLettersRequest())
    assert [letter.request_id for letter in left.letters] == ["third"]
    for unknown in ("1700000000000-0", "1700000000000-0.rings", f"{letters[2].id.partition('.')[0]}.squares"):
        error = await refused(served.stub.RetryDeadLetter(gateway_pb2.RetryDeadLetterRequest(id=unknown)))
        assert isinstance(error, NotFoundError)


async def test_a_model_is_live_while_every_stage_of_its_revision_takes_work(two):
    served = await two()
    assert await served.models() == {"shapes": False, "rings": False}
    for worker in FULL:
        assert await served.models() == {"shapes": False, "rings": False}
        await served.rings.transport.register(worker, lease_s=30)
    assert await served.models() == {"shapes": False, "rings": True}
    decoder = FULL[-1]
    for useless in (replace(decoder, draining=True), replace(decoder, model_revision="r0")):
        await served.rings.transport.register(useless, lease_s=30)
        assert await served.models() == {"shapes": False, "rings": False}
    await served.rings.transport.register(replace(decoder, worker_id="another"), lease_s=30)
    assert await served.models() == {"shapes": False, "rings": True}
    await served.rings.transport.unregister("another")
    assert await served.models() == {"shapes": False, "rings": False}


async def test_status_shows_the_stages_of_all(two):
    served = await two()
    for deployment, name in ((served.shapes, "shapes"), (served.rings, "rings")):
        for worker in FULL[:2]:
            one = replace(worker, worker_id=f"{name}-{worker.stage}", model=name)
            await deployment.transport.register(one, lease_s=30)
    # Each releases twice the 8 slots of its denoiser; the rest waits.
    for model, images in (("shapes", 20), ("rings", 17), ("rings", 5)):
        await served.stub.Submit(request(model=model, num_images=images))
    status = await served.stub.Status(types_pb2.StatusRequest())
    stages = {stage.worker_id: (stage.model, stage.backlog) for stage in status.stages}
    assert stages == {
        "shapes-encode": ("shapes", 16),
        "shapes-denoise": ("shapes", 0),
        "rings-encode": ("rings", 16),
        "rings-denoise": ("rings", 0),
    }
    assert status.waiting == 4 + 6
    assert (status.model, list(status.models)) == ("shapes", ["shapes", "rings"])
    assert status.counters["admitted_total"] == 3


async def test_what_expires_is_cleared_in_every_deployment(two, until):
    served = await two()
    for model in ("shapes", "rings"):
        await served.stub.Submit(request(f"r-{model}", model=model), timeout=0.5)

    async def ended() -> bool:
        jobs = [await served.stub.GetJob(job(f"r-{model}")) for model in ("shapes", "rings")]
        return all(each.state == types_pb2.JOB_STATE_DEADLINE for each in jobs)

    await until(ended)
