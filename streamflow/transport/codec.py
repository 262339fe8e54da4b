"""Arrays to bytes and back: dtype name, shape, little-endian data and a checksum, in protobuf; never pickle.

What arrives may come from a broken or hostile peer, so everything is checked before an array is made of it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from streamflow.errors import InvalidRequestError, shorten
from streamflow.types import Tensors
from streamflow.v1 import encoder_pb2, types_pb2

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float16", "int64", "uint8")
}
MAX_TENSOR_BYTES = 64 * 2**20
MAX_DIMENSIONS = 8

_Message = TypeVar("_Message", types_pb2.Tensor, encoder_pb2.Conditioning)


def to_pb(array: np.ndarray) -> types_pb2.Tensor:
    """The Tensor message of an array of any memory order and byte order.

    Raises:
        InvalidRequestError: a dtype that is not in `DTYPES`, or more than `MAX_DIMENSIONS` axes.
    """
    dtype = _dtype("dtype", array.dtype.name)
    if array.ndim > MAX_DIMENSIONS:
        raise InvalidRequestError("shape", array.shape, f"at most {MAX_DIMENSIONS} dimensions")
    data = array.astype(dtype, copy=False).tobytes(order="C")
    return types_pb2.Tensor(dtype=array.dtype.name, shape=array.shape, data=data, crc32=zlib.crc32(data))


def from_pb(
    tensor: types_pb2.Tensor, *, field: str = "tensor", max_bytes: int = MAX_TENSOR_BYTES, finite: bool = False
) -> np.ndarray:
    """A writable array that shares no memory with the message.

    Args:
        field: what errors call it.
        finite: refuse NaN and infinities.

    Raises:
        InvalidRequestError: unknown dtype, shape and data that do not match, too large, or a wrong checksum.
    """
    dtype = _dtype(f"{field}.dtype", tensor.dtype)
    shape = tuple(tensor.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidRequestError(f"{field}.shape", shape, f"at most {MAX_DIMENSIONS} dimensions")
    # Python's integers do not overflow, so a huge shape cannot wrap round to the size of the data.
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes > max_bytes:
        raise InvalidRequestError(f"{field}.shape", shape, f"at most {max_bytes} bytes")
    if size_bytes != len(tensor.data):
        raise InvalidRequestError(f"{field}.data", f"{len(tensor.data)} bytes", f"{size_bytes} bytes for {shape}")
    if zlib.crc32(tensor.data) != tensor.crc32:
        raise InvalidRequestError(f"{field}.crc32", tensor.crc32, "the CRC-32 of data", "the bytes were changed")
    try:
        array = np.frombuffer(tensor.data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # a side of 0 beside sides that no array can have
        raise InvalidRequestError(f"{field}.shape", shape, "a shape that an array can have") from error
    if finite and not np.isfinite(array).all():
        raise InvalidRequestError(field, "NaN or infinity", "finite numbers")
    return array


def encode(array: np.ndarray) -> bytes:
    """One array as bytes; see `to_pb` for what is allowed."""
    return to_pb(array).SerializeToString()


def decode(
    data: bytes, *, field: str = "tensor", max_bytes: int = MAX_TENSOR_BYTES, finite: bool = False
) -> np.ndarray:
    """The array of `encode`; see `from_pb` for what is refused."""
    return from_pb(_parse(types_pb2.Tensor, data, field), field=field, max_bytes=max_bytes, finite=finite)


def tensors_to_pb(tensors: Tensors, *, truncated: str = "") -> encoder_pb2.Conditioning:
    """Named arrays as a Conditioning message."""
    return encoder_pb2.Conditioning(
        tensors={name: to_pb(array) for name, array in tensors.items()}, truncated=truncated
    )


def tensors_from_pb(
    message: encoder_pb2.Conditioning,
    *,
    field: str = "tensors",
    max_bytes: int = MAX_TENSOR_BYTES,
    finite: bool = False,
) -> dict[str, np.ndarray]:
    """The arrays of a Conditioning message, by name; `max_bytes` is for all of them together."""
    total_bytes = sum(len(tensor.data) for tensor in message.tensors.values())
    if total_bytes > max_bytes:
        raise InvalidRequestError(field, f"{total_bytes} bytes", f"at most {max_bytes} bytes")
    return {
        name: from_pb(tensor, field=f"{field}[{shorten(name)}]", max_bytes=max_bytes, finite=finite)
        for name, tensor in message.tensors.items()
    }


def encode_tensors(tensors: Tensors) -> bytes:
    """Named arrays as bytes; equal arrays give equal bytes."""
    return tensors_to_pb(tensors).SerializeToString(deterministic=True)


def decode_tensors(
    data: bytes, *, field: str = "tensors", max_bytes: int = MAX_TENSOR_BYTES, finite: bool = False
) -> dict[str, np.ndarray]:
    """The arrays of `encode_tensors`, by name."""
    message = _parse(encoder_pb2.Conditioning, data, field)
    return tensors_from_pb(message, field=field, max_bytes=max_bytes, finite=finite)


def _dtype(field: str, name: str) -> np.dtype:
    if name not in DTYPES:
        raise InvalidRequestError(field, name, ", ".join(DTYPES))
    return DTYPES[name]


def _parse(kind: type[_Message], data: bytes, field: str) -> _Message:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequestError(field, data, f"a serialized {kind.__name__} message") from None
