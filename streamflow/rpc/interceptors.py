"""What happens to a call before a servicer sees it: its key is checked, it is counted, its bytes are parsed."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from streamflow.errors import (
    BusyError,
    DeadlineError,
    InvalidRequestError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from streamflow.rpc.auth import Keys
from streamflow.rpc.errors import abort, rpc_errors
from streamflow.telemetry import Sparing, get_logger

Handler = Any  # grpc.RpcMethodHandler; its stubs know the synchronous signatures only
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]
Context = grpc.aio.ServicerContext[Any, Any]

Receive = Callable[[Context], Awaitable[Any]]

HEALTH_PREFIX = "/grpc.health.v1.Health/"
OTHER = "other"
_REFUSALS = {UnauthenticatedError.code, PermissionDeniedError.code, BusyError.code}

_log = get_logger(__name__)

# A health check is a name of a service; it needs no key, so little is enough.
MAX_HEALTH_CALLS = 256
MAX_HEALTH_BYTES = 2**16
_HEALTH_AT_ONCE = 4
_READ_HEALTH_S = 5.0

# Of one tenant. Each may be as large as a message; most are small, and there at once.
_READ_AT_ONCE = 16
_READ_S = 60.0
# What a message may bring beside the fields that are known here; those of a newer client are small.
_SPARE_BYTES = 2**16


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


class CallLimit(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls over a number at once as BUSY; a tenant that has a key gets half of it, so that others get in.

    Health has places of its own: a server that is busy must not look dead.
    """

    def __init__(self, keys: Keys, most: int) -> None:
        self._keys, self._most = keys, most
        self._open: Counter[str] = Counter()
        self._healths = 0

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        is_health = handler_call_details.method.startswith(HEALTH_PREFIX)
        return _within(handler, self._health_place if is_health else self._place)

    @asynccontextmanager
    async def _place(self, context: Context) -> AsyncIterator[None]:
        async with rpc_errors(context):
            tenant = self._keys.caller(context.invocation_metadata()).tenant
            most = max(1, self._most // 2) if tenant else self._most
            if self._open[tenant] >= most or self._open.total() >= self._most:
                raise BusyError("too many calls are open at once; end some, or try again in a moment")
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1

    @asynccontextmanager
    async def _health_place(self, context: Context) -> AsyncIterator[None]:
        if self._healths >= MAX_HEALTH_CALLS:
            await abort(context, BusyError("too many health checks are open at once"))
        self._healths += 1
        try:
            yield
        finally:
            self._healths -= 1


class RequestParser(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Receives and parses requests itself.

    Left to gRPC, any number of them would be in memory at once, for as long as their calls last, and invalid UTF-8 and
    malformed protobuf would end as UNKNOWN. What may not be received yet stays at its client.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._of_health = asyncio.Semaphore(_HEALTH_AT_ONCE)
        self._of_tenants: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_READ_AT_ONCE))

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        is_health = handler_call_details.method.startswith(HEALTH_PREFIX)

        async def receive(context: Context) -> Any:
            async with rpc_errors(context):
                if is_health:
                    async with self._of_health:
                        data = await _read(context, timeout_s=_READ_HEALTH_S)
                else:
                    async with self._of_tenants[self._keys.caller(context.invocation_metadata()).tenant]:
                        data = await _read(context, timeout_s=_READ_S)
                if is_health and len(data) > MAX_HEALTH_BYTES:
                    raise InvalidRequestError("request", f"{len(data)} bytes", f"at most {MAX_HEALTH_BYTES} bytes")
                return _parse(handler, data)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _received_stream(handler, receive), None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            _received_unary(handler, receive), None, handler.response_serializer
        )


class CallTimer(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Tells of every call when it is over: its method, the name of its status, and seconds.

    A stream lasts as long as its client listens.

    Args:
        methods: what is told apart, as `/service/method`; whatever else a caller thinks of is `OTHER`.
    """

    def __init__(self, told: Callable[[str, str, float], None], methods: Collection[str]) -> None:
        self._told, self._methods = told, frozenset(methods)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(HEALTH_PREFIX):
            return handler
        name = _name(method, self._methods)

        @asynccontextmanager
        async def timed(context: Context) -> AsyncIterator[None]:
            began_s = time.perf_counter()
            try:
                yield
            finally:
                self._told(name, _code(context), time.perf_counter() - began_s)

        return _within(handler, timed)


class RefusalLog(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Writes a line for a call that is refused: for its key, or for load.

    Whoever can reach the port decides how many these are, so of one kind there are only some in a minute.

    Args:
        methods: see CallTimer.
    """

    def __init__(self, keys: Keys, methods: Collection[str]) -> None:
        self._keys, self._methods = keys, frozenset(methods)
        self._spared: defaultdict[tuple[str, str], Sparing] = defaultdict(Sparing)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(HEALTH_PREFIX):
            return handler
        name = _name(handler_call_details.method, self._methods)

        @asynccontextmanager
        async def watched(context: Context) -> AsyncIterator[None]:
            try:
                yield
            finally:
                self._tell(name, context)

        return _within(handler, watched)

    def _tell(self, method: str, context: Context) -> None:
        code = _code(context)
        if code not in _REFUSALS:
            return
        tenant = self._tenant(context)
        left_out = self._spared[code, tenant].turn()
        if left_out is not None:
            more = {"left_out": left_out} if left_out else {}
            _log.warning("refused", method=method, code=code, tenant=tenant, reason=context.details(), **more)

    def _tenant(self, context: Context) -> str:
        try:
            return self._keys.caller(context.invocation_metadata()).tenant
        except UnauthenticatedError:
            return ""


def _name(method: str, known: Collection[str]) -> str:
    """Of a method for people; what a caller thinks of is `OTHER`."""
    return method.rpartition("/")[2] if method in known else OTHER


def _within(handler: Handler, around: Callable[[Context], AbstractAsyncContextManager[None]]) -> Handler:
    """The same method, of whichever kind, with `around` entered while it runs."""
    kinds = {
        (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
        (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
        (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
        (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
    }
    behaviour, make = kinds[handler.request_streaming, handler.response_streaming]

    async def call(request: Any, context: Context) -> Any:
        async with around(context):
            return await behaviour(request, context)

    async def iterate(request: Any, context: Context) -> AsyncIterator[Any]:
        async with around(context), aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

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


def _received_unary(handler: Handler, receive: Receive) -> Any:
    async def receive_and_call(_: object, context: Context) -> Any:
        return await handler.unary_unary(await receive(context), context)

    return receive_and_call


def _received_stream(handler: Handler, receive: Receive) -> Any:
    async def receive_and_iterate(_: object, context: Context) -> AsyncIterator[Any]:
        async with aclosing(handler.unary_stream(await receive(context), context)) as responses:
            async for response in responses:
                yield response

    async def receive_and_write(_: object, context: Context) -> None:
        await handler.unary_stream(await receive(context), context)

    return receive_and_iterate if inspect.isasyncgenfunction(handler.unary_stream) else receive_and_write


async def _read(context: Context, *, timeout_s: float) -> bytes:
    """The request of a call, however it was declared."""
    reading = asyncio.ensure_future(context.read())
    # Not cancelled, since gRPC still writes to it: it ends with the call. Whatever it ends with is no news then.
    reading.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait([reading], timeout=timeout_s)
    if not reading.done():
        raise DeadlineError(f"the request did not arrive within {timeout_s:g} s")
    data = reading.result()
    if not isinstance(data, bytes):  # the end of a stream without a message
        raise InvalidRequestError("request", "nothing", "one message")
    return data


def _parse(handler: Handler, data: bytes) -> Any:
    try:
        request = handler.request_deserializer(data)
    except (DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        allowed = "a well-formed protobuf message whose strings are UTF-8"
        raise InvalidRequestError("request", f"{len(data)} bytes", allowed) from error
    if len(data) > _SPARE_BYTES:
        # Unknown fields, and all values of a field but its last one, take memory as long as the message does.
        request.DiscardUnknownFields()
        spare = len(data) - request.ByteSize()
        if spare > _SPARE_BYTES:
            given, allowed = f"{spare} bytes that belong to no field", f"at most {_SPARE_BYTES} bytes of unknown fields"
            raise InvalidRequestError("request", given, allowed, "send each field once")
    return request
