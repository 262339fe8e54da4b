"""With API keys: every method of the gateway is closed to strangers, and tells a tenant of itself alone."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest

from gateway.servicer import FOR_TENANTS
from streamflow.errors import BusyError, InvalidRequestError, NotFoundError, PermissionDeniedError
from streamflow.rpc.channels import key_metadata
from streamflow.rpc.errors import from_rpc_error
from streamflow.transport.policy import Policy
from streamflow.v1 import gateway_pb2, types_pb2
from tests.gateway.conftest import NAME, Deployment
from tests.gateway.test_gateway_dead import given_up
from tests.surface import call, methods, request_of, status

KEYS = "key-alice alice\nkey-bob bob\nkey-ops ops operator\n"
ALICE, BOB, OPS = (key_metadata(f"key-{name}") for name in ("alice", "bob", "ops"))
SECRET = "what alice alone may know"
STRANGERS = {
    "no key": (),
    "an empty key": key_metadata(" "),
    "a wrong key": key_metadata("key-eve"),
    "the hash of a key": key_metadata("sha256:0"),
    "another scheme": (("authorization", "Basic key-alice"),),
    "another header": (("x-api-key", "key-alice"),),
}

each_method = pytest.mark.parametrize("method", methods(NAME), ids=lambda method: method.name)


@pytest.mark.parametrize("metadata", STRANGERS.values(), ids=STRANGERS.keys())
@each_method
async def test_no_method_is_open_to_strangers(deploy, method, metadata):
    gateway = await deploy().gateway(keys=KEYS)
    assert await status(gateway.channel, method, request_of(method), metadata) == "UNAUTHENTICATED"


@each_method
async def test_a_tenant_hears_nothing_of_another_one(deploy, method):
    deployment: Deployment = deploy(policy=Policy(max_deliveries=1, retry_s=0.0))
    gateway = await deployment.gateway(keys=KEYS)
    letter = await given_up(deployment, gateway, key="key-alice", request_id="lost", prompts=[SECRET])
    await gateway.stub.Submit(types_pb2.GenerateRequest(request_id="hers", prompts=[SECRET]), metadata=ALICE)
    deployment.start_worker()
    request = request_of(method, request_id="hers", id=letter.id, prompts=["bob's own"])
    code, answer = await call(gateway.channel, method, request, BOB)
    asks_by_id = [field.name for field in method.input_type.fields] in (["request_id"], ["id"])
    assert code == ("NOT_FOUND" if asks_by_id else "OK" if method.name in FOR_TENANTS else "PERMISSION_DENIED")
    assert SECRET.encode() not in answer
    # What is hers is as it was.
    assert (await gateway.stub.GetJob(gateway_pb2.GetJobRequest(request_id="hers"), metadata=ALICE)).state in (
        types_pb2.JOB_STATE_QUEUED,
        types_pb2.JOB_STATE_RUNNING,
        types_pb2.JOB_STATE_IMAGES,
    )
    listed = await gateway.stub.ListDeadLetters(gateway_pb2.ListDeadLettersRequest(), metadata=ALICE)
    assert [one.id for one in listed.letters] == [letter.id]


async def refused(answer: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return from_rpc_error(caught.value)


async def test_the_stages_are_shown_to_operators(deploy):
    gateway = await deploy().gateway(keys=KEYS)
    assert (await gateway.stub.Status(types_pb2.StatusRequest(), metadata=OPS)).models
    error = await refused(gateway.stub.Status(types_pb2.StatusRequest(), metadata=ALICE))
    assert isinstance(error, PermissionDeniedError)
    assert "--operator" in str(error)
    # An operator is a tenant like others besides.
    job = await gateway.stub.Submit(types_pb2.GenerateRequest(prompts=["a ring"]), metadata=OPS)
    asked = gateway_pb2.GetJobRequest(request_id=job.request_id)
    assert isinstance(await refused(gateway.stub.GetJob(asked, metadata=ALICE)), NotFoundError)


async def test_a_key_may_bring_a_quota(deploy):
    keys = "key-alice alice jobs=1 images-per-minute=3\nkey-bob bob images-per-minute=0\n"
    gateway = await deploy(tenant_images_per_minute=8).gateway(keys=keys, tenant_images_per_minute=8)

    def submit(metadata: Any, images: int) -> Any:
        return gateway.stub.Submit(types_pb2.GenerateRequest(prompts=["a"], num_images=images), metadata=metadata)

    error = await refused(submit(ALICE, 4))
    assert isinstance(error, InvalidRequestError)
    assert "at most 3 images" in str(error)
    await submit(ALICE, 2)
    assert isinstance(await refused(submit(ALICE, 1)), BusyError)
    for _ in range(3):
        await submit(BOB, 9)
