"""What happens to a call before a servicer sees it: its key is checked, its bytes are parsed."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from streamflow.errors import InvalidRequestError, PermissionDeniedError, UnauthenticatedError
from streamflow.rpc.auth import Keys
from streamflow.rpc.errors import abort

Handler = Any  # grpc.RpcMethodHandler; its stubs know the synchronous signatures only
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]
Context = grpc.aio.ServicerContext[Any, Any]

HEALTH_PREFIX = "/grpc.health.v1.Health/"


class Authenticator(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls without a known key; health is the only exception.

    Args:
        for_tenants: the methods, as `/service/method`, that any known key opens; all others take an operator's.
    """

    def __init__(self, keys: Keys, for_tenants: Collection[str]) -> None:
        self._keys, self._for_tenants = keys, frozenset(for_tenants)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        try:
            self._check(handler_call_details)
        except UnauthenticatedError as error:
            return _refusal(error)
        return await continuation(handler_call_details)

    def _check(self, call: grpc.HandlerCallDetails) -> None:
        if call.method.startswith(HEALTH_PREFIX):
            return
        caller = self._keys.caller(call.invocation_metadata)
        if call.method not in self._for_tenants and not caller.operator:
            raise PermissionDeniedError(
                "only an operator's key opens this call; `streamflow keys create NAME --operator` makes one"
            )


class RequestParser(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Parses the request's bytes itself: left to gRPC, invalid UTF-8 and malformed protobuf end as UNKNOWN."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_parsing_stream(handler), None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(_parsing_unary(handler), None, handler.response_serializer)


def _refusal(error: UnauthenticatedError) -> Handler:
    async def refuse(requests: object, context: Context) -> None:
        await abort(context, error)

    # The most general kind of method: it refuses the other three as well, without reading a request.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _parsing_unary(handler: Handler) -> Any:
    async def parse_and_call(data: bytes, context: Context) -> Any:
        return await handler.unary_unary(await _parse(handler, data, context), context)

    return parse_and_call


def _parsing_stream(handler: Handler) -> Any:
    async def parse_and_iterate(data: bytes, context: Context) -> AsyncIterator[Any]:
        request = await _parse(handler, data, context)
        async with aclosing(handler.unary_stream(request, context)) as responses:
            async for response in responses:
                yield response

    async def parse_and_write(data: bytes, context: Context) -> None:
        await handler.unary_stream(await _parse(handler, data, context), context)

    return parse_and_iterate if inspect.isasyncgenfunction(handler.unary_stream) else parse_and_write


async def _parse(handler: Handler, data: bytes, context: Context) -> Any:
    try:
        return handler.request_deserializer(data)
    except (DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        allowed = "a well-formed protobuf message whose strings are UTF-8"
        await abort(context, InvalidRequestError("request", f"{len(data)} bytes", allowed))
