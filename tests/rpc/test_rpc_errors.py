"""An error raised in a servicer is the same error at the client."""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio
import pytest

from streamflow.errors import (
    AlreadyExistsError,
    BusyError,
    DeadlineError,
    GenerationError,
    InvalidRequestError,
    JobCancelledError,
    NotFoundError,
    PermissionDeniedError,
    StreamFlowError,
    UnauthenticatedError,
    UnavailableError,
)
from streamflow.rpc.channels import Target, open_aio_channel, open_channel
from streamflow.rpc.errors import NEUTRAL_MESSAGE, from_rpc_error, from_status
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc

pytestmark = pytest.mark.timeout(60)

ERRORS = [
    InvalidRequestError("steps", 0, "1 to 100", "leave it out for the default"),
    InvalidRequestError("prompts[0]", "nul \0, quote ' and שלום", "text"),
    NotFoundError("no job x"),
    AlreadyExistsError("x is taken"),
    UnauthenticatedError("no key"),
    PermissionDeniedError("an operator's call"),
    JobCancelledError("cancelled"),
    DeadlineError("too late"),
    GenerationError("non-finite latents", stage="denoiser"),
]


async def call(channel, request_id="x"):
    stub = gateway_pb2_grpc.GatewayStub(channel)
    try:
        return await stub.GetJob(gateway_pb2.GetJobRequest(request_id=request_id))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_keeps_class_message_and_parts(serve, servicer, error):
    servicer.error = error
    async with serve() as (_, channel):
        with pytest.raises(type(error)) as caught:
            await call(channel)
    assert str(caught.value) == str(error)
    for part in ("field", "given", "allowed", "hint", "stage"):
        assert getattr(caught.value, part, None) == getattr(error, part, None)


async def test_a_stream_fails_in_the_same_way_after_its_first_message(serve, servicer):
    servicer.error = NotFoundError("gone")
    async with serve() as (_, channel):
        stream = aiter(gateway_pb2_grpc.GatewayStub(channel).Watch(gateway_pb2.WatchRequest(request_id="x")))
        assert (await anext(stream)).request_id == "x"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(stream)
    assert isinstance(from_rpc_error(caught.value), NotFoundError)


async def test_busy_tells_when_to_come_back_in_grpcs_own_way(serve, servicer):
    servicer.error = BusyError("queue full", retry_after_s=2.5)
    async with serve() as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway_pb2_grpc.GatewayStub(channel).GetJob(gateway_pb2.GetJobRequest())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "2500") in [(key, value) for key, value in caught.value.trailing_metadata()]
    assert from_rpc_error(caught.value).retry_after_s == 2.5


async def test_the_synchronous_client_gets_the_same(serve, servicer):
    servicer.error = BusyError("queue full", retry_after_s=0.25)

    def ask(address: str) -> StreamFlowError:
        with open_channel(Target(address)) as channel:
            try:
                gateway_pb2_grpc.GatewayStub(channel).GetJob(gateway_pb2.GetJobRequest(), timeout=30)
            except grpc.RpcError as error:
                return from_rpc_error(error)
            raise AssertionError("the call succeeded")

    async with serve() as (server, _):
        error = await asyncio.to_thread(ask, server.address)
    assert isinstance(error, BusyError)
    assert (str(error), error.retry_after_s) == ("queue full", 0.25)


async def test_the_unexpected_stays_in_the_log(serve, servicer, caplog):
    servicer.error = RuntimeError("redis://user:secret@host")
    with caplog.at_level(logging.ERROR):
        async with serve() as (_, channel):
            with pytest.raises(GenerationError) as caught:
                await call(channel)
    assert str(caught.value) == NEUTRAL_MESSAGE
    assert any(record.exc_info and record.exc_info[1] is servicer.error for record in caplog.records)


async def test_errors_of_a_task_group_come_out_of_it(serve, servicer):
    servicer.error = ExceptionGroup("tasks", [ExceptionGroup("inner", [DeadlineError("too late")])])
    async with serve() as (_, channel):
        with pytest.raises(DeadlineError, match="too late"):
            await call(channel)


async def test_a_bug_beside_a_refusal_in_a_task_group_wins(serve, servicer, caplog):
    servicer.error = ExceptionGroup("tasks", [DeadlineError("too late"), ZeroDivisionError()])
    async with serve() as (_, channel):
        with pytest.raises(GenerationError):
            await call(channel)


async def test_a_long_message_is_cut_to_what_metadata_carries(serve, servicer):
    servicer.error = NotFoundError("ш" * 100_000)
    async with serve() as (_, channel):
        with pytest.raises(NotFoundError) as caught:
            await call(channel)
    assert 100 < len(str(caught.value)) < 1000
    assert str(caught.value).endswith("...")


async def test_a_message_over_the_limit_is_the_callers_mistake(serve):
    async with serve(max_message_bytes=2**20) as (_, channel):
        with pytest.raises(InvalidRequestError, match="too large"):
            await call(channel, request_id="x" * (2**20 + 100))


async def test_a_server_that_is_not_there_is_unavailable(unused_tcp_port):
    async with open_aio_channel(Target(f"localhost:{unused_tcp_port}")) as channel:
        with pytest.raises(UnavailableError):
            await call(channel)


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_every_status_becomes_a_streamflow_error(code):
    error = from_status(code, "message")
    assert isinstance(error, StreamFlowError)
    assert "message" in str(error)
