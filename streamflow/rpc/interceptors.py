"""What happens to a call before a servicer sees it: its key is checked, its bytes are parsed."""

from __future__ import annotations

import inspect
import time
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


class CallTimer(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Tells of every call when it is over: its method, the name of its status, and seconds.

    A stream lasts as long as its client listens.
    """

    def __init__(self, told: Callable[[str, str, float], None]) -> None:
        self._told = told

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(HEALTH_PREFIX):
            return handler
        began_s = time.perf_counter()

        def over(context: Context) -> None:
            self._told(method.rpartition("/")[2], _code(context), time.perf_counter() - began_s)

        return _watched(handler, over)


def _watched(handler: Handler, over: Callable[[Context], None]) -> Handler:
    """The same method, of whichever kind, with `over` called when it has ended."""
    kinds = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    }
    behaviour, make = kinds[handler.request_streaming, handler.response_streaming]

    async def call(request: Any, context: Context) -> Any:
        try:
            return await behaviour(request, context)
        finally:
            over(context)

    async def iterate(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response
        finally:
            over(context)

    chosen = iterate if inspect.isasyncgenfunction(behaviour) else call
    return make(chosen, handler.request_deserializer, handler.response_serializer)


def _code(context: Context) -> str:
    if context.cancelled():
        return grpc.StatusCode.CANCELLED.name
    code = context.code()
    # 0 where nothing was set: all went well.
    return code.name if isinstance(code, grpc.StatusCode) else grpc.StatusCode.OK.name


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
