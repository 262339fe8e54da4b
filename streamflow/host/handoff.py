"""What one stage tells the next about an image: the names and bytes of an entry's payload.

to denoise:  text0 ...      cache key of the Conditioning of each role's text
             init, mask     SHA-256 of a blob with the tensor
             state          from a denoiser that is leaving: where the image stands, as latents below;
             done           and how many evaluations are behind it, such as 3/8
to decode:   latents        the tensor itself up to 256 KiB, else
             latents_blob   the SHA-256 of a blob with it
always:      timings        what the image has cost so far
             returns        how often the image was sent back because a tensor was gone; absent = never
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from google.protobuf.message import DecodeError

from streamflow.errors import NOT_FINITE, GenerationError
from streamflow.flow.programs import Role
from streamflow.transport import codec
from streamflow.transport.base import Entry, Payload, Transport
from streamflow.transport.handling import Advance
from streamflow.types import ModelCard, SlotState, Stage
from streamflow.v1 import types_pb2

INIT, MASK = "init", "mask"
TIMINGS, RETURNS = "timings", "returns"
LATENTS, STATE, DONE = "latents", "state", "done"
BLOB = "_blob"

MAX_INLINE_BYTES = 256 * 2**10
KEEP_MARGIN_S = 60.0
"""What an image needs is kept for so long beyond its deadline."""

MAX_RETURNS = 3

_REFERENCE = re.compile(rb"[0-9a-f]{64}")
_PROGRESS = re.compile(rb"(\d{1,6})/(\d{1,6})")


def text_field(role: Role) -> str:
    """The payload's name for a role's text."""
    return f"text{role.value}"


@contextmanager
def malformed(entry: Entry) -> Iterator[None]:
    """Turns what is wrong with an entry's bytes into a failure of its image: no user caused it, and no retry mends it.

    Raises:
        GenerationError: for any ValueError, which InvalidRequestError is, and for broken protobuf.
    """
    try:
        yield
    except (DecodeError, ValueError) as error:
        raise GenerationError(f"the entry for {entry.stage.service} is malformed: {error}") from error


def keep_s(entry: Entry) -> float:
    """How long from now an image may need what is stored for it."""
    return max(0.0, entry.remaining_s) + KEEP_MARGIN_S


def reference(payload: Payload, name: str) -> str | None:
    """A hash; None where the payload has none of this name. Raises ValueError for anything else."""
    value = payload.get(name)
    if value is None:
        return None
    if not _REFERENCE.fullmatch(value):
        raise ValueError(f"{name}: got {value[:80]!r}; allowed: 64 hexadecimal digits")
    return value.decode()


async def pack_latents(
    transport: Transport, latents: np.ndarray, *, keep_s: float, admitted: bool = True
) -> dict[str, bytes]:
    """Payload fields for latents.

    Args:
        admitted: for admitted work, which goes on when the store is full; previews do not.
    """
    return await _pack(transport, LATENTS, codec.encode(latents), keep_s=keep_s, admitted=admitted)


async def unpack_latents(transport: Transport, payload: Payload) -> np.ndarray | None:
    """The latents of `pack_latents`; None when their blob is gone.

    Raises:
        ValueError: the payload has none, or broken ones.
    """
    if LATENTS not in payload and LATENTS + BLOB not in payload:
        raise ValueError(f"neither {LATENTS} nor {LATENTS}{BLOB} is there")
    data = await _unpack(transport, LATENTS, payload)
    return None if data is None else codec.decode(data, field=LATENTS)


async def pack_state(transport: Transport, state: SlotState, *, keep_s: float) -> dict[str, bytes]:
    """Payload fields for an unfinished image.

    Raises:
        GenerationError: it holds NaN or infinities; no other denoiser could mend that.
    """
    _check_finite(state.latents, state.velocity)
    data = codec.encode_tensors({"latents": state.latents, "velocity": state.velocity})
    fields = await _pack(transport, STATE, data, keep_s=keep_s)
    return {**fields, DONE: f"{state.ops_done}/{state.ops}".encode()}


async def unpack_state(transport: Transport, payload: Payload, *, shape: tuple[int, int, int]) -> SlotState | None:
    """The state of `pack_state`; None where there is none, or where its blob is gone.

    Raises:
        ValueError: it is broken.
        GenerationError: it holds NaN or infinities.
    """
    data = await _unpack(transport, STATE, payload)
    if data is None:
        return None
    done = _PROGRESS.fullmatch(payload.get(DONE, b""))
    if done is None or not int(done[1]) < int(done[2]):
        raise ValueError(f"{DONE}: got {payload.get(DONE, b'')[:80]!r}; allowed: evaluations done and all, such as 3/8")
    tensors = codec.decode_tensors(data, field=STATE)
    for name in ("latents", "velocity"):
        if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != np.float32:
            raise ValueError(f"{STATE}: {name} is missing, or not float32 {shape}")
    _check_finite(tensors["latents"], tensors["velocity"])
    return SlotState(tensors["latents"], tensors["velocity"], int(done[1]), int(done[2]))


def _check_finite(*tensors: np.ndarray) -> None:
    if not all(np.isfinite(tensor).all() for tensor in tensors):
        raise GenerationError(NOT_FINITE, stage=Stage.DENOISE.service)


def without_state(payload: Payload) -> dict[str, bytes]:
    """The other fields."""
    return {name: value for name, value in payload.items() if name not in (STATE, STATE + BLOB, DONE)}


async def _pack(
    transport: Transport, name: str, data: bytes, *, keep_s: float, admitted: bool = True
) -> dict[str, bytes]:
    """By value where it is small, else by reference."""
    if len(data) <= MAX_INLINE_BYTES:
        return {name: data}
    return {name + BLOB: (await transport.put_blob(data, keep_s=keep_s, admitted=admitted)).encode()}


async def _unpack(transport: Transport, name: str, payload: Payload) -> bytes | None:
    if name in payload:
        return payload[name]
    sha256 = reference(payload, name + BLOB)
    return None if sha256 is None else await transport.get_blob(sha256)


def carried(entry: Entry, timings: types_pb2.Timings) -> dict[str, bytes]:
    """The payload fields that go with an image through every stage."""
    returns = {RETURNS: entry.payload[RETURNS]} if RETURNS in entry.payload else {}
    return {TIMINGS: timings.SerializeToString(), **returns}


def image_s(timings: types_pb2.Timings) -> float:
    """What an image has taken so far, from its admission on; no two machines' clocks are compared."""
    return (timings.waiting_ms + timings.encode_ms + timings.denoise_ms + timings.decode_ms) / 1000


def send_back(entry: Entry, timings: types_pb2.Timings) -> Advance:
    """Has the image encoded again, because a tensor that it needs is no longer stored.

    Raises:
        GenerationError: it was sent back `MAX_RETURNS` times already, and would be for ever.
    """
    with malformed(entry):
        returns = int(entry.payload.get(RETURNS, b"0"))
    if returns >= MAX_RETURNS:
        message = (
            f"the image's tensors were gone {returns + 1} times before they were used: what is under way does not fit "
            "into the cache; use fewer slots (--slots) or fewer different prompts at once"
        )
        raise GenerationError(message, stage=entry.stage.service)
    return Advance(Stage.ENCODE, {**carried(entry, timings), RETURNS: str(returns + 1).encode()})


def latent_shape(card: ModelCard, *, width: int, height: int) -> tuple[int, int, int]:
    """[channels, height / f, width / f] of a picture's latents."""
    return card.latent_channels, height // card.latent_factor, width // card.latent_factor


class Stopwatch:
    """One image's timings in one stage.

    `waiting_ms` is what the image spent in queues: from admission to the encoder, and in the streams between stages.
    The other times are those of the stages' handlers, with fetching, waiting for a batch or a slot, and storing.

    Args:
        entry: just read.
        since_s: since when it has been waiting, by the transport's clock; None = since the entry was appended.

    Raises:
        DecodeError: the payload's timings are broken.
    """

    def __init__(self, entry: Entry, *, since_s: float | None = None) -> None:
        self._started_s = time.monotonic()
        self._timings = types_pb2.Timings.FromString(entry.payload.get(TIMINGS, b""))
        read_at_s = entry.deadline_at_s - entry.remaining_s
        again = TIMINGS in entry.payload
        waited_s = read_at_s - (entry.enqueued_at_s if again or since_s is None else since_s)
        self._timings.waiting_ms += max(0.0, waited_s) * 1000

    def stop(self, stage: Literal["encode", "denoise", "decode"]) -> types_pb2.Timings:
        """The timings with this stage's time in them."""
        elapsed_ms = (time.monotonic() - self._started_s) * 1000
        field = f"{stage}_ms"
        setattr(self._timings, field, getattr(self._timings, field) + elapsed_ms)
        return self._timings
