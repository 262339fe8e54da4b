"""The gateway's calls, from a client's side, over both transports."""

from __future__ import annotations

import asyncio
import io
import logging

import grpc
import grpc.aio
import numpy as np
import pytest
import redis
from PIL import Image

from gateway.images import prepare
from gateway.pipeline import Pipeline
from streamflow.config import GatewaySettings
from streamflow.errors import (
    AlreadyExistsError,
    BusyError,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from streamflow.rpc.auth import Caller
from streamflow.rpc.channels import key_metadata
from streamflow.rpc.errors import from_rpc_error
from streamflow.telemetry import Counters
from streamflow.transport.base import ImageRef, blob_name
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.policy import Policy
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Failure, Stage, WorkerInfo
from streamflow.v1 import gateway_pb2, types_pb2
from tests.cards import CARD

pytestmark = pytest.mark.timeout(60)

TEXT = "a red circle"
KEYS = "key-alice alice\nkey-bob bob\n"
ALICE, BOB = key_metadata("key-alice"), key_metadata("key-bob")


def request(**fields: object) -> types_pb2.GenerateRequest:
    return types_pb2.GenerateRequest(**{"prompts": [TEXT], **fields})


def watch(request_id: str) -> gateway_pb2.WatchRequest:
    return gateway_pb2.WatchRequest(request_id=request_id)


def job(request_id: str) -> gateway_pb2.GetJobRequest:
    return gateway_pb2.GetJobRequest(request_id=request_id)


def cancel(request_id: str) -> gateway_pb2.CancelRequest:
    return gateway_pb2.CancelRequest(request_id=request_id)


async def read(call, kinds=None) -> list:
    """All events, or those of some kinds."""
    return [event async for event in call if kinds is None or event.WhichOneof("event") in kinds]


async def read_until(events, kind: str):
    async for event in events:
        if event.WhichOneof("event") == kind:
            return getattr(event, kind)
    raise AssertionError(f"no {kind}")


async def refused(call) -> Exception:
    """The StreamFlowError with which a call of either kind ends."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (read(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    return from_rpc_error(caught.value)


def pictures(events) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for event in events:
        if event.WhichOneof("event") == "image":
            assert event.image.offset_bytes == len(found.get(event.image.info.index, b""))
            found[event.image.info.index] = found.get(event.image.info.index, b"") + event.image.data
    return found


async def test_a_request_becomes_its_pictures(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    deployment.start_worker()
    asked = request(prompts=[TEXT, "a blue square"], num_images=2, seed=2**64 - 2, request_id="r-1", steps=7)
    events = await read(gateway.stub.Generate(asked))
    assert {event.request_id for event in events} == {"r-1"}
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-1], kinds.count("done"), kinds.count("image")) == ("accepted", "done", 1, 4)
    accepted = events[0].accepted
    assert (accepted.seed, accepted.num_images, accepted.steps) == (2**64 - 2, 4, 7)
    assert (accepted.model, accepted.model_revision, accepted.attached) == ("shapes", "r1", False)
    assert (accepted.sampler, accepted.width, accepted.guidance_scale) == ("euler", 64, 3.0)
    assert events[-1].done.state == types_pb2.JOB_STATE_IMAGES
    assert not events[-1].done.HasField("failure")
    seeds = {event.image.info.index: event.image.info.seed for event in events if event.HasField("image")}
    assert seeds == {0: 2**64 - 2, 1: 2**64 - 1, 2: 0, 3: 1}
    for data in pictures(events).values():
        assert np.asarray(Image.open(io.BytesIO(data))).shape == (64, 64, 3)


async def test_the_stages_read_the_request_with_its_defaults(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    worker = deployment.start_worker()
    await read(gateway.stub.Generate(request()))
    spec = worker.specs[0]
    assert (spec.model_revision, spec.tenant) == ("r1", "")
    assert (spec.request.steps, spec.request.num_images, spec.request.HasField("seed")) == (4, 1, True)
    assert spec.request.output.format == types_pb2.IMAGE_FORMAT_PNG


async def test_progress_is_passed_on(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    worker = deployment.start_worker(open_gate=False)
    events = aiter(gateway.stub.Generate(request()))
    await read_until(events, "accepted")
    worker.gate.set()
    progress = await read_until(events, "progress")
    assert (progress.index, progress.step, progress.steps) == (0, 1, 4)


async def test_large_images_come_in_parts_of_a_mebibyte(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    deployment.start_worker()
    # Noise does not compress: about 3 MiB.
    events = await read(gateway.stub.Generate(request(width=1024, height=1024, seed=5)), {"image"})
    sizes = [len(event.image.data) for event in events]
    assert len(sizes) >= 3
    assert set(sizes[:-1]) == {2**20}
    assert {event.image.total_bytes for event in events} == {sum(sizes)}
    Image.open(io.BytesIO(pictures(events)[0])).load()


async def test_warnings_are_passed_on_once(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    worker = deployment.start_worker(open_gate=False)
    worker.warnings = ("the prompt was cut after 'circle'",)
    events = aiter(gateway.stub.Generate(request(request_id="r-1")))
    assert "cut after" in (await read_until(events, "warning")).message
    worker.gate.set()
    assert "warning" not in [event.WhichOneof("event") async for event in events]
    assert [warning.message for warning in (await gateway.stub.GetJob(job("r-1"))).warnings] == list(worker.warnings)


async def test_the_same_request_again_attaches_whatever_the_seed(deploy):
    deployment = deploy()
    first, second = await deployment.gateway(), await deployment.gateway()
    worker = deployment.start_worker(open_gate=False)
    one = aiter(first.stub.Generate(request(request_id="r-1")))
    two = aiter(second.stub.Generate(request(request_id="r-1")))
    accepted = [await read_until(events, "accepted") for events in (one, two)]
    assert [event.attached for event in accepted].count(True) == 1
    assert accepted[0].seed == accepted[1].seed
    worker.gate.set()
    made = [pictures([event async for event in events]) for events in (one, two)]
    assert made[0] == made[1] != {}
    assert len(worker.specs) == 1
    # And once more when it is over.
    events = await read(first.stub.Generate(request(request_id="r-1")))
    assert events[0].accepted.attached
    assert pictures(events) == made[0]


async def test_random_seeds_differ(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    jobs = [await gateway.stub.Submit(request()) for _ in range(4)]
    assert len({each.seed for each in jobs}) == len({each.request_id for each in jobs}) == 4


async def test_another_request_under_the_same_id_is_refused(deploy):
    gateway = await deploy().gateway()
    await gateway.stub.Submit(request(request_id="r-1"))
    error = await refused(gateway.stub.Generate(request(request_id="r-1", steps=9)))
    assert isinstance(error, AlreadyExistsError)
    assert "'r-1'" in str(error)


async def test_headers_tell_that_a_request_was_admitted(deploy):
    deployment = deploy(max_jobs=1)
    gateway = await deployment.gateway()
    call = gateway.stub.Generate(request(request_id="r-1"))
    assert ("streamflow-request-id", "r-1") in list(await call.initial_metadata())
    refusal = gateway.stub.Generate(request(request_id="r-2"))
    assert "streamflow-request-id" not in dict(await refusal.initial_metadata())
    error = await refused(refusal)
    assert isinstance(error, BusyError)
    assert error.retry_after_s > 0
    call.cancel()


async def test_any_gateway_can_watch_before_and_after_the_end(deploy):
    deployment = deploy()
    first, second = await deployment.gateway(), await deployment.gateway()
    worker = deployment.start_worker(open_gate=False)
    call = first.stub.Generate(request(request_id="r-1"))
    await read_until(aiter(call), "accepted")
    watching = aiter(second.stub.Watch(watch("r-1")))
    assert (await read_until(watching, "accepted")).attached
    worker.gate.set()
    rest = [event async for event in watching]
    assert rest[-1].done.state == types_pb2.JOB_STATE_IMAGES
    assert pictures(rest) == pictures(await read(second.stub.Watch(watch("r-1")))) != {}


async def test_cancel_ends_a_job_everywhere(deploy):
    deployment = deploy()
    first, second = await deployment.gateway(), await deployment.gateway()
    deployment.start_worker(open_gate=False)
    events = aiter(first.stub.Generate(request(request_id="r-1")))
    await read_until(events, "accepted")
    assert (await second.stub.Cancel(cancel("r-1"))).state == types_pb2.JOB_STATE_CANCELLED
    done = await read_until(events, "done")
    assert (done.state, done.failure.code) == (types_pb2.JOB_STATE_CANCELLED, "CANCELLED")
    assert (await first.stub.Cancel(cancel("r-1"))).state == types_pb2.JOB_STATE_CANCELLED


async def test_cancelling_a_finished_job_changes_nothing(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    deployment.start_worker()
    await read(gateway.stub.Generate(request(request_id="r-1")))
    cancelled = await gateway.stub.Cancel(cancel("r-1"))
    assert (cancelled.state, cancelled.num_finished) == (types_pb2.JOB_STATE_IMAGES, 1)


async def test_the_calls_deadline_is_the_jobs(deploy, until):
    deployment = deploy()
    gateway = await deployment.gateway()
    deployment.start_worker(open_gate=False)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(gateway.stub.Generate(request(request_id="r-1"), timeout=1.0))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def ended():
        found = await gateway.stub.GetJob(job("r-1"))
        return found if found.state == types_pb2.JOB_STATE_DEADLINE else None

    found = await until(ended)
    assert found.failure.code == "DEADLINE_EXCEEDED"
    assert 0 < found.deadline_at_s - found.admitted_at_s <= 1.0


async def test_a_job_that_nobody_watches_ends_and_a_detached_one_does_not(deploy, until):
    deployment = deploy()
    gateway = await deployment.gateway(watch_lease_s=0.5)
    deployment.start_worker(open_gate=False)
    for request_id, detach in (("left", False), ("kept", True)):
        call = gateway.stub.Generate(request(request_id=request_id, detach=detach))
        await read_until(aiter(call), "accepted")
        call.cancel()

    async def cancelled():
        return (await gateway.stub.GetJob(job("left"))).state == types_pb2.JOB_STATE_CANCELLED

    await until(cancelled)
    assert (await gateway.stub.GetJob(job("kept"))).state < types_pb2.JOB_STATE_IMAGES


async def test_the_log_says_once_how_each_job_ended(deploy, until, caplog):
    caplog.set_level(logging.INFO)
    deployment = deploy()
    gateways = [await deployment.gateway(watch_lease_s=0.5) for _ in range(2)]
    stub = gateways[0].stub
    await stub.Submit(request(request_id="late"), timeout=0.6)
    call = stub.Generate(request(request_id="left"))
    await read_until(aiter(call), "accepted")
    call.cancel()
    await stub.Submit(request(request_id="cancelled"))
    await stub.Cancel(cancel("cancelled"))

    async def ended():
        fields = [vars(record)["streamflow_fields"] for record in caplog.records if record.message == "ended"]
        return fields if len(fields) >= 3 else None

    await until(ended)
    deployment.start_worker()
    await read(stub.Generate(request(request_id="made")))

    async def all_ended():
        fields = await ended()
        return fields if len(fields) >= 4 else None

    told = await until(all_ended)
    assert {fields["model"] for fields in told} == {CARD.name}
    states = sorted((fields["job"], fields["state"]) for fields in told)
    assert states == [("cancelled", "cancelled"), ("late", "deadline"), ("left", "cancelled"), ("made", "images")]


async def test_a_job_that_is_watched_outlives_its_lease(deploy, until):
    deployment = deploy()
    gateway = await deployment.gateway(watch_lease_s=0.6)
    worker = deployment.start_worker(open_gate=False)
    watched = aiter(gateway.stub.Generate(request(request_id="watched")))
    await read_until(watched, "accepted")
    call = gateway.stub.Generate(request(request_id="left"))
    await read_until(aiter(call), "accepted")
    call.cancel()

    async def cancelled():
        return (await gateway.stub.GetJob(job("left"))).state == types_pb2.JOB_STATE_CANCELLED

    # By then the lease of the other one would have lapsed as well.
    await until(cancelled)
    worker.gate.set()
    assert (await read_until(watched, "done")).state == types_pb2.JOB_STATE_IMAGES


async def test_nothing_is_left_of_clients_that_go_away(deploy, until):
    gateway = await deploy().gateway(watch_lease_s=600)
    submitted = await gateway.stub.Submit(request())
    calls = [gateway.stub.Watch(watch(submitted.request_id)) for _ in range(20)]
    await asyncio.gather(*(call.read() for call in calls))

    def watchers() -> int:
        return sum(task.get_name().startswith("watch ") for task in asyncio.all_tasks())

    assert watchers() == 20
    for call in calls:
        call.cancel()

    async def gone():
        return watchers() == 0

    await until(gone)


async def test_a_failed_image_ends_the_job_and_says_where(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    worker = deployment.start_worker()
    worker.fail[0] = Failure("INTERNAL", "non-finite latents", "denoiser")
    done = (await read(gateway.stub.Generate(request())))[-1].done
    assert done.state == types_pb2.JOB_STATE_ERROR
    assert (done.failure.code, done.failure.message, done.failure.stage) == (
        "INTERNAL",
        "non-finite latents",
        "denoiser",
    )
    error = await refused(gateway.stub.GenerateImages(request()))
    assert isinstance(error, GenerationError)
    assert (str(error), error.stage) == ("non-finite latents", "denoiser")


async def test_images_in_one_answer(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    deployment.start_worker()
    answer = await gateway.stub.GenerateImages(request(num_images=3, seed=10, request_id="r-1"))
    assert (answer.request_id, answer.seed) == ("r-1", 10)
    assert [(image.info.index, image.info.seed) for image in answer.images] == [(0, 10), (1, 11), (2, 12)]
    assert pictures(await read(gateway.stub.Watch(watch("r-1")))) == {
        image.info.index: image.data for image in answer.images
    }


async def test_images_that_do_not_fit_into_one_answer_can_still_be_read(deploy):
    deployment = deploy()
    gateway = await deployment.gateway(max_message_bytes=2**20)
    deployment.start_worker()
    asked = request(width=512, height=512, num_images=2, request_id="r-1")
    error = await refused(gateway.stub.GenerateImages(asked))
    assert isinstance(error, InvalidRequestError)
    assert "use Generate" in str(error)
    assert len(pictures(await read(gateway.stub.Watch(watch("r-1"))))) == 2


async def test_only_an_answer_that_was_given_counts_as_delivered(deploy, until):
    deployment = deploy(policy=Policy(delivered_s=0.05))
    gateway = await deployment.gateway(max_message_bytes=2**20)
    deployment.start_worker()
    refused_first = request(width=512, height=512, num_images=2, request_id="too-large")
    assert isinstance(await refused(gateway.stub.GenerateImages(refused_first)), InvalidRequestError)
    await gateway.stub.GenerateImages(request(request_id="given"))
    await read(gateway.stub.Generate(request(request_id="streamed")))

    async def gone() -> bool:
        results = [await deployment.transport.result(ImageRef(name, 0)) for name in ("given", "streamed")]
        return results == [None, None]

    await until(gone)
    assert await deployment.transport.result(ImageRef("too-large", 0)) is not None


async def test_queue_positions_fall(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    worker = deployment.start_worker(open_gate=False)
    calls = [gateway.stub.Submit(request(num_images=8)) for _ in range(3)]
    await asyncio.gather(*calls)
    events = aiter(gateway.stub.Generate(request()))
    first = await read_until(events, "queued")
    assert first.position >= 8
    worker.gate.set()
    rest = [event async for event in events]
    positions = [event.queued.position for event in rest if event.HasField("queued")]
    assert [first.position, *positions] == sorted({first.position, *positions}, reverse=True)
    assert rest[-1].done.state == types_pb2.JOB_STATE_IMAGES


async def test_submit_returns_at_once_and_the_job_goes_on(deploy, until):
    deployment = deploy()
    gateway = await deployment.gateway(watch_lease_s=0.3)
    submitted = await gateway.stub.Submit(request(num_images=2, seed=3))
    assert submitted.state in (types_pb2.JOB_STATE_QUEUED, types_pb2.JOB_STATE_RUNNING)
    assert (submitted.num_images, submitted.num_finished, submitted.seed) == (2, 0, 3)
    deployment.start_worker()

    async def finished():
        return (await gateway.stub.GetJob(job(submitted.request_id))).num_finished == 2

    await until(finished)
    assert len(pictures(await read(gateway.stub.Watch(watch(submitted.request_id))))) == 2


async def test_jobs_are_listed_newest_first_page_by_page(deploy):
    gateway = await deploy().gateway()
    for number in range(5):
        await gateway.stub.Submit(request(request_id=f"r-{number}"))
    pages, token = [], ""
    while token or not pages:
        page = await gateway.stub.ListJobs(gateway_pb2.ListJobsRequest(page_size=2, page_token=token))
        pages.append([each.request_id for each in page.jobs])
        token = page.next_page_token
    assert pages == [["r-4", "r-3"], ["r-2", "r-1"], ["r-0"]]
    for bad in ({"page_size": 1001}, {"page_token": "a:b"}, {"page_token": "nan:r-1"}, {"page_token": "1.0:../x"}):
        error = await refused(gateway.stub.ListJobs(gateway_pb2.ListJobsRequest(**bad)))
        assert isinstance(error, InvalidRequestError)
        assert error.field in bad


async def test_a_page_goes_on_where_the_last_job_of_the_one_before_is_gone(deploy, until):
    gateway = await deploy(policy=Policy(tombstone_s=0.05)).gateway(keys=KEYS)
    for number in range(5):
        await gateway.stub.Submit(request(request_id=f"r-{number}"), metadata=ALICE)
        await gateway.stub.Submit(request(request_id=f"r-{number}"), metadata=BOB)

    async def page(token: str = "") -> tuple[list[str], str]:
        asked = gateway_pb2.ListJobsRequest(page_size=2, page_token=token)
        answer = await gateway.stub.ListJobs(asked, metadata=ALICE)
        return [each.request_id for each in answer.jobs], answer.next_page_token

    ids, token = await page()
    assert ids == ["r-4", "r-3"]
    await gateway.stub.Cancel(cancel("r-3"), metadata=ALICE)

    async def gone() -> bool:
        return (await page())[0] == ["r-4", "r-2"]

    await until(gone)
    ids, token = await page(token)
    assert ids == ["r-2", "r-1"]
    assert await page(token) == (["r-0"], "")


async def test_tenants_do_not_see_each_other(deploy):
    deployment = deploy()
    gateway = await deployment.gateway(keys=KEYS)
    deployment.start_worker()
    mine = request(request_id="r-1", seed=1)
    events = await read(gateway.stub.Generate(mine, metadata=ALICE))
    assert events[-1].done.state == types_pb2.JOB_STATE_IMAGES
    for call in (
        gateway.stub.GetJob(job("r-1"), metadata=BOB),
        gateway.stub.Cancel(cancel("r-1"), metadata=BOB),
        gateway.stub.Watch(watch("r-1"), metadata=BOB),
    ):
        assert isinstance(await refused(call), NotFoundError)
    assert not (await gateway.stub.ListJobs(gateway_pb2.ListJobsRequest(), metadata=BOB)).jobs
    listed = await gateway.stub.ListJobs(gateway_pb2.ListJobsRequest(), metadata=ALICE)
    assert [each.request_id for each in listed.jobs] == ["r-1"]
    # The same id is free for another tenant, even with the same request.
    theirs = await read(gateway.stub.Generate(mine, metadata=BOB))
    assert not theirs[0].accepted.attached


async def test_models_and_status(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    model = (await gateway.stub.ListModels(gateway_pb2.ListModelsRequest())).models[0]
    assert (model.name, model.max_steps, list(model.samplers)) == ("shapes", 50, ["euler"])
    worker = WorkerInfo("w-1", Stage.DENOISE, "127.0.0.1:9", "shapes", "r1", "torch-eager", "cpu", 8, started_at_s=1.0)
    await deployment.transport.register(worker, lease_s=30)
    for _ in range(3):
        await gateway.stub.Submit(request(num_images=8))
    status = await gateway.stub.Status(types_pb2.StatusRequest())
    assert [(stage.stage, stage.slots, stage.worker_id) for stage in status.stages] == [("denoiser", 8, "w-1")]
    assert status.stages[0].uptime_s > 1e9
    assert status.waiting == 24 - 16
    assert status.counters["admitted_total"] == 3
    assert status.model == "shapes"


@pytest.mark.parametrize("method", ["GetJob", "Cancel", "Watch"])
async def test_jobs_that_are_not_there(deploy, method):
    gateway = await deploy().gateway()
    ask = {"GetJob": job, "Cancel": cancel, "Watch": watch}[method]
    error = await refused(getattr(gateway.stub, method)(ask("never-was")))
    assert isinstance(error, NotFoundError)
    assert "'never-was'" in str(error)
    assert isinstance(await refused(getattr(gateway.stub, method)(ask("../x"))), InvalidRequestError)


async def test_a_gateway_that_drains_lets_its_streams_go_on_elsewhere(deploy):
    deployment = deploy()
    first, second = await deployment.gateway(), await deployment.gateway()
    worker = deployment.start_worker(open_gate=False)
    call = first.stub.Generate(request(request_id="r-1"))
    await read_until(aiter(call), "accepted")
    draining = asyncio.create_task(first.server.drain())
    assert isinstance(await refused(call), UnavailableError)
    await draining
    worker.gate.set()
    events = await read(second.stub.Watch(watch("r-1")))
    assert events[-1].done.state == types_pb2.JOB_STATE_IMAGES


async def test_source_images_reach_the_stages_as_plain_pngs(deploy):
    deployment = deploy()
    gateway = await deployment.gateway()
    worker = deployment.start_worker()
    values = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    files = io.BytesIO(), io.BytesIO()
    Image.fromarray(values).save(files[0], "JPEG")
    Image.fromarray(values[:, :, 0]).save(files[1], "WEBP")
    init, mask = (file.getvalue() for file in files)
    events = await read(gateway.stub.Generate(request(init_image=init, mask_image=mask, width=32, height=24)))
    assert events[-1].done.state == types_pb2.JOB_STATE_IMAGES
    spec = worker.specs[0]
    assert not spec.request.init_image
    assert spec.request.strength == pytest.approx(0.8)
    found = [await deployment.transport.get_blob(name) for name in (spec.init_image_blob, spec.mask_blob)]
    opened = [Image.open(io.BytesIO(data)) for data in found]
    assert [(image.format, image.mode, image.size) for image in opened] == [
        ("PNG", "RGB", (32, 24)),
        ("PNG", "L", (32, 24)),
    ]


async def test_a_request_over_its_quota_is_refused_before_its_images_are_touched(deploy):
    deployment = deploy(max_tenant_jobs=1)
    gateway = await deployment.gateway()
    values = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    png = {"init_image": file.getvalue(), "width": 32, "height": 24}
    await gateway.stub.Submit(request(request_id="first", **png))
    blob = prepare(file.getvalue(), b"", width=32, height=24, max_pixels=10**6).init
    smaller = {"init_image": file.getvalue(), "width": 16, "height": 16}
    assert isinstance(await refused(gateway.stub.Submit(request(**smaller))), BusyError)
    unused = prepare(file.getvalue(), b"", width=16, height=16, max_pixels=10**6).init
    stored = [await deployment.transport.get_blob(blob_name(data)) for data in (blob, unused)]
    assert stored == [blob, None]
    # Decoding it would have said that it is none.
    no_picture = request(init_image=b"no picture")
    assert isinstance(await refused(gateway.stub.Submit(no_picture)), BusyError)
    again = await gateway.stub.Submit(request(request_id="first", **png))
    assert again.request_id == "first"
    deployment.start_worker()
    events = await read(gateway.stub.Watch(watch("first")))
    assert events[-1].done.state == types_pb2.JOB_STATE_IMAGES
    counters = (await gateway.stub.Status(types_pb2.StatusRequest())).counters
    assert (counters["busy_tenant_jobs_total"], counters["busy_total"], counters["busy_full_total"]) == (2, 2, 0)


async def test_a_full_store_is_counted_by_the_gateway():
    counters = Counters()
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as raw:
        transport = RedisTransport.from_url(server.url)
        pipeline = Pipeline(transport, card=CARD, settings=GatewaySettings(), counters=counters)
        assert counters.snapshot()["busy_full_total"] == 0
        raw.config_set("maxmemory", 100_000)
        for fields in ({}, {"init_image": b"no picture"}):
            with pytest.raises(BusyError, match="full"):
                await pipeline.submit(request(**fields), caller=Caller(""), remaining_s=None, detach=True)
        assert {name: count for name, count in counters.snapshot().items() if count} == {
            "busy_total": 2,
            "busy_full_total": 2,
        }
        raw.config_set("maxmemory", 0)
        assert not (await transport.overview()).totals
        await transport.close()


async def test_a_bad_source_image_is_refused_before_anything_is_written(deploy):
    gateway = await deploy().gateway()
    error = await refused(gateway.stub.Generate(request(init_image=b"\x89PNG\r\n\x1a\nnot quite")))
    assert isinstance(error, InvalidRequestError)
    assert error.field == "init_image"
    assert not (await gateway.stub.ListJobs(gateway_pb2.ListJobsRequest())).jobs
