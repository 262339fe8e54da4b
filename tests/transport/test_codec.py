"""Arrays survive the wire to the bit; anything else is refused, and nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import pickletools
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streamflow.errors import InvalidRequestError
from streamflow.transport import codec
from streamflow.v1 import types_pb2

few = settings(max_examples=40, deadline=None)
arrays = st.sampled_from(sorted(codec.DTYPES)).flatmap(
    lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@few
@given(arrays)
def test_round_trip(array):
    decoded = codec.decode(codec.encode(array))
    assert same(decoded, array)
    decoded.fill(0)  # writable


@few
@given(st.dictionaries(st.text(max_size=8), arrays, max_size=4))
def test_named_round_trip(tensors):
    data = codec.encode_tensors(tensors)
    decoded = codec.decode_tensors(data)
    assert decoded.keys() == tensors.keys()
    assert all(same(decoded[name], tensors[name]) for name in tensors)
    assert codec.encode_tensors(dict(reversed(tensors.items()))) == data


def test_memory_and_byte_order_do_not_matter():
    array = np.arange(24, dtype="float32").reshape(2, 3, 4)
    for other in (np.asfortranarray(array), array.astype(">f4"), np.repeat(array, 2, axis=2)[:, :, ::2]):
        assert codec.encode(other) == codec.encode(array)


@few
@given(arrays, st.data())
def test_a_changed_byte_never_gives_another_array(array, data):
    encoded = bytearray(codec.encode(array))
    if not encoded:
        return
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        decoded = codec.decode(bytes(encoded))
    except InvalidRequestError:
        return
    # What was hit did not matter to the array's bytes: only its name for them, or how they are folded.
    assert decoded.tobytes() == array.tobytes()


@few
@given(st.binary(max_size=200))
def test_random_bytes_give_an_array_or_our_error(data):
    for decode in (codec.decode, codec.decode_tensors):
        with contextlib.suppress(InvalidRequestError):
            decode(data)


def tensor(**fields) -> types_pb2.Tensor:
    data = np.arange(6, dtype="<f4").tobytes()
    return types_pb2.Tensor(**{"dtype": "float32", "shape": [2, 3], "data": data, "crc32": zlib.crc32(data), **fields})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dtype": "object"}, "dtype"),
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": ""}, "dtype"),
        ({"dtype": "float16"}, "data"),
        ({"shape": [2, 4]}, "data"),
        ({"shape": []}, "data"),
        ({"shape": [2**32 - 1] * 8}, "shape"),
        # In 64 bits this product is 6.
        ({"shape": [2**31, 2**31, 4, 6]}, "shape"),
        ({"shape": [1] * 8 + [6]}, "shape"),
        ({"data": b""}, "data"),
        ({"crc32": 1}, "crc32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, named):
    with pytest.raises(InvalidRequestError) as refusal:
        codec.from_pb(tensor(**fields), field="latents")
    assert refusal.value.field == f"latents.{named}"


def test_limits_and_finiteness():
    assert codec.from_pb(tensor(), max_bytes=24).shape == (2, 3)
    with pytest.raises(InvalidRequestError, match="at most 23 bytes"):
        codec.from_pb(tensor(), max_bytes=23)
    two = codec.encode_tensors({"a": np.zeros(3, "uint8"), "b": np.zeros(3, "uint8")})
    assert len(codec.decode_tensors(two, max_bytes=6)) == 2
    with pytest.raises(InvalidRequestError, match="6 bytes"):
        codec.decode_tensors(two, max_bytes=5)
    for value in (np.nan, np.inf):
        data = codec.encode(np.full((2,), value, "float16"))
        assert codec.decode(data).shape == (2,)
        with pytest.raises(InvalidRequestError, match="finite"):
            codec.decode(data, finite=True)


def test_what_cannot_be_sent_is_refused():
    for array in (np.zeros(2, "float64"), np.array(["text"]), np.array([object()]), np.zeros((1,) * 9, "uint8")):
        with pytest.raises(InvalidRequestError):
            codec.encode(array)


def test_pickles_are_only_bytes():
    executed: list[str] = []
    # A pickle that calls print when it is loaded.
    evil = b"cbuiltins\nprint\n(S'loaded'\ntR."
    pickletools.dis(evil, out=_Sink(executed))
    assert any("GLOBAL" in line for line in executed)
    with pytest.raises(InvalidRequestError):
        codec.decode(evil)


class _Sink:
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def write(self, text: str) -> None:
        self.lines.append(text)
