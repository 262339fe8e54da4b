"""Bytes as a peer writes them to Redis: an entry that the stages can work on, or a failure of its image alone.

The fuzzer makes the fields of a stream entry, a specification and what is stored; the head of the entry is what the
script that gives entries out lets through.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, cast

from tests.fuzz.fuzzing import run, watched

with watched():
    import numpy as np
    from google.protobuf.message import DecodeError

    from streamflow.errors import GenerationError
    from streamflow.flow.programs import Role
    from streamflow.host import handoff
    from streamflow.host.request import read_request
    from streamflow.transport import codec
    from streamflow.transport.base import Entry, Transport
    from streamflow.transport.replies import Delivery, entry_from, preview_from
    from streamflow.types import Stage
    from streamflow.v1 import encoder_pb2, types_pb2
    from tests.properties.strategies import CARD, check_failure

NAMES = (handoff.LATENTS, handoff.STATE, handoff.TIMINGS, handoff.RETURNS, handoff.DONE, handoff.INIT)
NAMES += (handoff.LATENTS + handoff.BLOB, handoff.STATE + handoff.BLOB, handoff.text_field(Role.TARGET))
SHAPE = (4, 2, 2)


class Store:
    """The transport, as far as it gives out what somebody stored."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def get_blob(self, sha256: str) -> bytes | None:
        return self._data or None


def now(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing: a loop for each would take longer than the work."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def failing(work: Callable[[], object]) -> None:
    """Runs a part of a handler; a failure says in few words what is wrong."""
    try:
        work()
    except GenerationError as failure:
        check_failure(failure, "")


class Reader:
    """Parts of the fuzzer's bytes, from the front; what is not there is empty."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def rest(self) -> bytes:
        return self._data[self._at :]


def target(data: bytes) -> None:
    reader = Reader(data)
    flags = reader.number(1)
    fields = {b"v": b"1", b"job": b"job", b"index": b"0", b"deadline": b"9999999999.5"}
    fields[b"trace"] = reader.take(reader.number(1) % 8)
    for _ in range(flags >> 4):
        known = reader.number(1)
        name = NAMES[known].encode() if known < len(NAMES) else reader.take(known % 8)
        fields[b"p:" + name] = reader.take(reader.number(2))
    stored = reader.take(reader.number(2))
    if flags & 8:
        # What hides behind a checksum is not found by chance.
        fields = {name: mended(value) for name, value in fields.items()}
        stored = mended(stored)

    entry = entry_from(list(Stage)[flags % 3], Delivery("1700000000000-0", 1, fields), now_s=1_700_000_000.0)
    for part in (timed, referred):
        failing(partial(part, entry))
    for part_of_store in (latents, state, tensors):
        failing(partial(part_of_store, entry, stored))
    failing(partial(read_request, reader.rest(), 0, CARD))
    preview([b"job", b"job", b"index", b"0", b"step", fields.get(b"p:returns", b"1")])


def mended(data: bytes) -> bytes:
    """Tensors with their right checksums; other bytes as they are."""
    try:
        tensors = encoder_pb2.Conditioning.FromString(data)
        one = types_pb2.Tensor.FromString(data)
    except DecodeError:
        return data
    if one.dtype in codec.DTYPES:
        one.crc32 = zlib.crc32(one.data)
        return one.SerializeToString()
    for tensor in tensors.tensors.values():
        tensor.crc32 = zlib.crc32(tensor.data)
    return tensors.SerializeToString() if tensors.tensors else data


def timed(entry: Entry) -> None:
    with handoff.malformed(entry):
        timings = handoff.Stopwatch(entry).stop("denoise")
    handoff.send_back(entry, timings)


def latents(entry: Entry, stored: bytes) -> None:
    with handoff.malformed(entry):
        array = now(handoff.unpack_latents(cast("Transport", Store(stored)), entry.payload))
    assert array is None or codec.encode(array)


def state(entry: Entry, stored: bytes) -> None:
    with handoff.malformed(entry):
        left = now(handoff.unpack_state(cast("Transport", Store(stored)), entry.payload, shape=SHAPE))
    if left is not None:
        assert left.latents.shape == left.velocity.shape == SHAPE
        assert 0 <= left.ops_done < left.ops


def tensors(entry: Entry, stored: bytes) -> None:
    with handoff.malformed(entry):
        arrays = codec.decode_tensors(stored, field=handoff.text_field(Role.TARGET), finite=True)
    assert all(np.isfinite(array).all() for array in arrays.values())


def referred(entry: Entry) -> None:
    for name in NAMES:
        with handoff.malformed(entry):
            sha256 = handoff.reference(entry.payload, name)
        assert sha256 is None or len(sha256) == 64


def preview(raw: list[bytes]) -> None:
    try:
        preview_from(raw)
    except (KeyError, ValueError):  # what the transport expects of it
        return


def seed(fields: dict[str, bytes], stored: bytes, *, flags: int = 8) -> bytes:
    parts = [bytes([len(fields) << 4 | flags]), b"\0"]
    for name, value in fields.items():
        parts += [bytes([NAMES.index(name)]), len(value).to_bytes(2, "big"), value]
    request = types_pb2.GenerateRequest(
        prompts=["a red circle"], steps=2, guidance_scale=2.0, sampler="euler", seed=7, width=16, height=16
    )
    spec = types_pb2.JobSpec(request=request, model_revision=CARD.revision, init_image_blob="0" * 64)
    return b"".join([*parts, len(stored).to_bytes(2, "big"), stored, spec.SerializeToString()])


def seeds() -> Iterator[bytes]:
    array = np.zeros(SHAPE, np.float32)
    one, reference = codec.encode(array), b"0" * 64
    left = codec.encode_tensors({"latents": array, "velocity": array})
    timings = types_pb2.Timings(waiting_ms=1.0, encode_ms=2.0).SerializeToString()
    for flags in (0, 1, 2, 8):
        yield seed({"latents": one, "timings": timings, "returns": b"2"}, one, flags=flags)
    yield seed({"latents_blob": reference, "timings": timings}, one)
    yield seed({"state": left, "done": b"1/2", "text0": reference}, left)
    yield seed({"state_blob": reference, "done": b"1/2", "init": reference}, left)
    for dtype in codec.DTYPES:
        yield seed({"latents": codec.encode(array.astype(dtype))}, codec.encode_tensors({"prompt_embeds": array}))


if __name__ == "__main__":
    run(target, seeds())
