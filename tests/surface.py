"""Every method of every service, from the generated descriptors: what is added there is tested by itself."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

import streamflow.v1


def services() -> dict[str, ServiceDescriptor]:
    """By their full names."""
    names = [module.name for module in pkgutil.iter_modules(streamflow.v1.__path__) if module.name.endswith("_pb2")]
    files = [import_module(f"streamflow.v1.{name}").DESCRIPTOR for name in names]
    return {service.full_name: service for file in files for service in file.services_by_name.values()}


def methods(service: str) -> list[MethodDescriptor]:
    return list(services()[service].methods)


def every_method() -> Iterator[Any]:
    """For `pytest.mark.parametrize`."""
    import pytest

    for service in services().values():
        for method in service.methods:
            yield pytest.param(method, id=f"{service.name}.{method.name}")


def request_of(method: MethodDescriptor, **fields: object) -> Message:
    """A request in which those of the fields are set that it has."""
    known = method.input_type.fields_by_name
    return GetMessageClass(method.input_type)(**{name: value for name, value in fields.items() if name in known})


async def call(
    channel: grpc.aio.Channel, method: MethodDescriptor, request: Message, metadata: Any = (), *, timeout_s: float = 20
) -> tuple[str, bytes]:
    """The name of the status, and all that is told with it: the answer's bytes, or the error's message and metadata."""
    assert not method.client_streaming, "nobody streams requests here yet"
    path, data = f"/{method.containing_service.full_name}/{method.name}", request.SerializeToString()
    try:
        if method.server_streaming:
            parts = channel.unary_stream(path)(data, metadata=metadata, timeout=timeout_s)
            return "OK", b"".join([part async for part in parts])
        return "OK", await channel.unary_unary(path)(data, metadata=metadata, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code().name, f"{error.details()} {error.trailing_metadata()}".encode()


async def status(*args: Any, **kwargs: Any) -> str:
    return (await call(*args, **kwargs))[0]
