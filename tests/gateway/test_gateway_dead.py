"""Requests that were given up: listed for their tenant alone, and tried again."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from streamflow.stages.imaging import encode_image
from streamflow.transport.policy import Policy
from streamflow.types import ImageFormat, Stage
from streamflow.v1 import gateway_pb2, types_pb2
from tests.cards import CARD
from tests.gateway.conftest import KEYS, Deployment

ONCE = Policy(max_deliveries=1, retry_s=0.0)
PNG = encode_image(np.zeros((64, 64, 3), np.uint8), ImageFormat.PNG)


def request(**fields: Any) -> types_pb2.GenerateRequest:
    return types_pb2.GenerateRequest(**{"prompts": ["a blue star"], **fields})


async def given_up(deployment: Deployment, gateway: Any, *, key: str | None = None, **fields: Any) -> Any:
    """A request whose image the encoder gave up; its letter."""
    metadata = [("authorization", f"Bearer {key}")] if key else None
    await gateway.stub.Submit(request(**fields), metadata=metadata)
    transport = deployment.transport
    [entry] = await transport.read(Stage.ENCODE, "w", 1, block_s=0.2)
    await transport.hand_back(Stage.ENCODE, "w", [entry], count_attempt=True)
    assert await transport.read(Stage.ENCODE, "w", 1, block_s=0) == []
    listed = await gateway.stub.ListDeadLetters(gateway_pb2.ListDeadLettersRequest(), metadata=metadata)
    return listed.letters[0]


async def test_a_letter_tells_what_was_asked_for_and_is_retried_once(deploy, until):
    deployment = deploy(policy=ONCE)
    gateway = await deployment.gateway()
    letter = await given_up(deployment, gateway, request_id="lost", prompts=["a red ring"], seed=5)
    assert (letter.request_id, letter.index, letter.service, letter.attempts) == ("lost", 0, "encoder", 1)
    assert (list(letter.request.prompts), letter.request.seed) == (["a red ring"], 5)
    assert "1 attempts" in letter.reason
    retried = [
        (await gateway.stub.RetryDeadLetter(gateway_pb2.RetryDeadLetterRequest(id=letter.id))).request_id
        for _ in range(2)
    ]
    assert retried == [f"retry-{letter.id}"] * 2
    assert not (await gateway.stub.ListDeadLetters(gateway_pb2.ListDeadLettersRequest())).letters
    deployment.start_worker()
    done = [e async for e in gateway.stub.Watch(gateway_pb2.WatchRequest(request_id=retried[0]))]
    assert done[-1].done.state == types_pb2.JOB_STATE_IMAGES
    assert {e.image.info.seed for e in done if e.HasField("image")} == {5}
    # The one that was given up stays what it is.
    job = await gateway.stub.GetJob(gateway_pb2.GetJobRequest(request_id="lost"))
    assert job.state == types_pb2.JOB_STATE_ERROR


async def test_tenants_see_their_own_letters_alone(deploy):
    deployment = deploy(policy=ONCE)
    gateway = await deployment.gateway(keys=KEYS)
    letter = await given_up(deployment, gateway, key="key-alice")
    other = [("authorization", "Bearer key-bob")]
    assert not (await gateway.stub.ListDeadLetters(gateway_pb2.ListDeadLettersRequest(), metadata=other)).letters
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await gateway.stub.RetryDeadLetter(gateway_pb2.RetryDeadLetterRequest(id=letter.id), metadata=other)
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("letter_id", ["", "x", "1-2-3", "17-0\n", "9" * 50, "../1", "17-0.", "17-0.a b"])
async def test_ids_that_are_none_are_refused(deploy, letter_id):
    gateway = await deploy().gateway()
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await gateway.stub.RetryDeadLetter(gateway_pb2.RetryDeadLetterRequest(id=letter_id))
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "id" in refusal.value.details()


async def test_a_letter_whose_images_are_gone_says_so(deploy, monkeypatch):
    deployment = deploy(policy=ONCE)
    gateway = await deployment.gateway()
    letter = await given_up(deployment, gateway, init_image=PNG)

    async def gone(sha256: str) -> None:
        assert len(sha256) == len(hashlib.sha256().hexdigest())

    monkeypatch.setattr(deployment.transport, "get_blob", gone)
    with pytest.raises(grpc.aio.AioRpcError, match="send the request again with its images"):
        await gateway.stub.RetryDeadLetter(gateway_pb2.RetryDeadLetterRequest(id=letter.id))
    monkeypatch.undo()
    retried = await gateway.stub.RetryDeadLetter(gateway_pb2.RetryDeadLetterRequest(id=letter.id))
    assert retried.model == CARD.name


async def test_the_limit_of_a_list_is_checked(deploy):
    gateway = await deploy().gateway()
    with pytest.raises(grpc.aio.AioRpcError, match="limit"):
        await gateway.stub.ListDeadLetters(gateway_pb2.ListDeadLettersRequest(limit=1001))
