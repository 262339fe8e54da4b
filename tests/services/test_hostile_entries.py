"""Entries and specifications from a broken or hostile peer: each image fails alone, clearly, and nothing crashes."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

import numpy as np
import pytest

from services.decoder.handler import DecodeHandler
from streamflow.errors import GenerationError, StreamFlowError
from streamflow.stages.imaging import encode_image
from streamflow.transport import codec
from streamflow.transport.base import ImageRef, PreviewTask
from streamflow.transport.handling import Advance
from streamflow.types import Failure, ImageFormat, Stage
from streamflow.v1 import encoder_pb2, types_pb2
from tests.services.conftest import Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = np.zeros((4, 16, 16), np.float32)


def spoilt(array: np.ndarray, value: float) -> bytes:
    array = array.copy()
    array.flat[3] = value
    return codec.encode(array)


def changed(array: np.ndarray, change: Callable[[types_pb2.Tensor], object]) -> bytes:
    message = codec.to_pb(array)
    change(message)
    return message.SerializeToString()


LATENTS = {
    "missing": {},
    "empty": {"latents": b""},
    "pickle": {"latents": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."},
    "random": {"latents": bytes(range(256)) * 8},
    "cut": {"latents": codec.encode(GOOD)[:-7]},
    "float16": {"latents": codec.encode(GOOD.astype(np.float16))},
    "int64": {"latents": codec.encode(GOOD.astype(np.int64))},
    "unknown dtype": {"latents": changed(GOOD, lambda m: setattr(m, "dtype", "object"))},
    "shape beyond the data": {"latents": changed(GOOD, lambda m: m.shape.append(2))},
    "shape that overflows": {"latents": changed(GOOD, lambda m: m.shape.extend([2**32 - 1] * 5))},
    "checksum": {"latents": changed(GOOD, lambda m: setattr(m, "crc32", 1))},
    "another size": {"latents": codec.encode(GOOD[:, :8])},
    "another rank": {"latents": codec.encode(GOOD[0])},
    "NaN": {"latents": spoilt(GOOD, np.nan)},
    "infinity": {"latents": spoilt(GOOD, -np.inf)},
    "reference that is none": {"latents_blob": b"../../etc/passwd"},
    "reference too long": {"latents_blob": b"a" * 10_000},
    "timings": {"latents": codec.encode(GOOD), "timings": b"\xff\xff\xff"},
}


@pytest.mark.parametrize("payload", LATENTS.values(), ids=LATENTS.keys())
async def test_decoder_fails_the_image_alone(rig: Rig, payload: dict[str, bytes]) -> None:
    entry = await rig.forge(Stage.DECODE, payload)
    with pytest.raises(GenerationError, match=r"malformed|not finite"):
        await rig.handle(entry)


async def cached(rig: Rig, data: bytes) -> bytes:
    key = "c" * 64
    await rig.transport.put_cached(key, data, keep_s=60)
    return key.encode()


def conditioning(**tensors: np.ndarray) -> bytes:
    return codec.encode_tensors(tensors)


EMBEDS = np.zeros((12, 16), np.float32)
CONDITIONING = {
    "random": b"\xff" * 64,
    "pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00.",
    "NaN": conditioning(prompt_embeds=np.full_like(EMBEDS, np.nan)),
    "broken tensor": encoder_pb2.Conditioning(tensors={"prompt_embeds": types_pb2.Tensor()}).SerializeToString(),
    "other names": conditioning(embeds=EMBEDS),
    "more names": conditioning(prompt_embeds=EMBEDS, pooled=EMBEDS),
    "no names": conditioning(),
    "another shape": conditioning(prompt_embeds=EMBEDS[:5]),
}


@pytest.mark.parametrize("data", CONDITIONING.values(), ids=CONDITIONING.keys())
async def test_denoiser_fails_the_image_alone(rig: Rig, data: bytes) -> None:
    entry = await rig.forge(Stage.DENOISE, {"text0": await cached(rig, data)})
    with pytest.raises(StreamFlowError, match=r"malformed|conditioning"):
        await rig.handle(entry)


STATE = {"latents": GOOD, "velocity": GOOD}
STATES = {
    "random": {"state": b"\xff" * 64, "done": b"1/2"},
    "nothing done": {"state": codec.encode_tensors(STATE)},
    "all done": {"state": codec.encode_tensors(STATE), "done": b"2/2"},
    "no numbers": {"state": codec.encode_tensors(STATE), "done": b"-1/2"},
    "huge numbers": {"state": codec.encode_tensors(STATE), "done": b"1/" + b"9" * 5000},
    "no velocity": {"state": codec.encode_tensors({"latents": GOOD}), "done": b"1/2"},
    "another shape": {"state": codec.encode_tensors({**STATE, "velocity": GOOD[:, :8]}), "done": b"1/2"},
    "another type": {"state": codec.encode_tensors({**STATE, "latents": GOOD.astype(np.float16)}), "done": b"1/2"},
    "NaN": {"state": codec.encode_tensors({**STATE, "latents": GOOD * np.nan}), "done": b"1/2"},
    "reference that is none": {"state_blob": b"../../etc/passwd", "done": b"1/2"},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
async def test_denoiser_refuses_states_that_are_none(rig: Rig, state: dict[str, bytes]) -> None:
    entry = await rig.forge(Stage.DENOISE, {"text0": await cached(rig, conditioning(prompt_embeds=EMBEDS)), **state})
    with pytest.raises(GenerationError, match=r"malformed|not finite"):
        await rig.handle(entry)


@pytest.mark.parametrize("payload", [{}, {"text0": b""}, {"text0": b"\xff" * 64}, {"text0": b"C" * 64}])
async def test_denoiser_refuses_references_that_are_none(rig: Rig, payload: dict[str, bytes]) -> None:
    entry = await rig.forge(Stage.DENOISE, payload)
    with pytest.raises(GenerationError, match="malformed"):
        await rig.handle(entry)


async def test_a_guided_image_without_its_negative_is_malformed(rig: Rig) -> None:
    key = await cached(rig, conditioning(prompt_embeds=EMBEDS))
    entry = await rig.forge(Stage.DENOISE, {"text0": key}, rig.spec(guidance_scale=4.0))
    with pytest.raises(GenerationError, match="text1 is missing"):
        await rig.handle(entry)


def cases(rig: Rig) -> dict[str, types_pb2.JobSpec | bytes]:
    def spec(**changes: object) -> types_pb2.JobSpec:
        made = rig.spec()
        for name, value in changes.items():
            setattr(made.request, name, value)
        return made

    foreign, maskless, no_prompt = rig.spec(), rig.spec(), rig.spec()
    foreign.model_revision = "another"
    maskless.mask_blob = "0" * 64
    del no_prompt.request.prompts[:]
    return {
        "empty": b"",
        "random": b"\xff" * 40,
        "foreign model": foreign,
        "mask without image": maskless,
        "no prompt": no_prompt,
        "no steps": spec(steps=0),
        "endless steps": spec(steps=2**31),
        "NaN guidance": spec(guidance_scale=float("nan")),
        "infinite guidance": spec(guidance_scale=float("inf")),
        "negative guidance": spec(guidance_scale=-1.0),
        "no width": spec(width=0),
        "odd height": spec(height=63),
        "huge width": spec(width=2**31),
        "unknown sampler": spec(sampler="no-such"),
        "unknown format": output(rig, format=99),
        "unknown decoder": output(rig, decoder=99),
        "quality": output(rig, quality=1000),
    }


def output(rig: Rig, **fields: int) -> types_pb2.JobSpec:
    spec = rig.spec()
    options = b"".join(struct.pack("B", NUMBERS[name] << 3) + _varint(value) for name, value in fields.items())
    spec.request.output.MergeFromString(options)
    return spec


NUMBERS = {"format": 1, "quality": 2, "decoder": 3}


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


async def test_every_stage_refuses_a_specification_that_cannot_be(rig: Rig) -> None:
    for name, spec in cases(rig).items():
        await rig.admit(spec, name=name)
        entry = await rig.next(Stage.ENCODE)
        for stage in Stage:
            with pytest.raises(GenerationError, match="specification cannot be used"):
                await rig.handle(entry)
            following = {Stage.ENCODE: Stage.DENOISE, Stage.DENOISE: Stage.DECODE}.get(stage)
            if following is not None:
                payload = {"text0": b"0" * 64, "latents": codec.encode(GOOD)}
                assert await rig.transport.advance(entry, following, payload)
                entry = await rig.next(following)
        assert await rig.transport.finish(entry, Failure("INTERNAL", name))


PNG = encode_image(np.zeros((64, 64, 3), np.uint8), ImageFormat.PNG)
PICTURES = {
    "another size": encode_image(np.zeros((32, 64, 3), np.uint8), ImageFormat.PNG),
    "another format": encode_image(np.zeros((64, 64, 3), np.uint8), ImageFormat.JPEG),
    "cut": PNG[:60],
    "text": b"not a picture",
}


@pytest.mark.parametrize("data", PICTURES.values(), ids=PICTURES.keys())
async def test_encoder_refuses_pictures_that_the_gateway_would_not_store(rig: Rig, data: bytes) -> None:
    spec = rig.spec()
    spec.init_image_blob = await rig.transport.put_blob(data, keep_s=60)
    await rig.admit(spec)
    with pytest.raises(GenerationError, match="malformed"):
        await rig.step(Stage.ENCODE)


async def test_a_lost_init_image_is_said_clearly(rig: Rig) -> None:
    spec = rig.spec()
    spec.init_image_blob = "0" * 64
    await rig.admit(spec)
    with pytest.raises(GenerationError, match="no longer stored"):
        await rig.step(Stage.ENCODE)


async def test_a_broken_cached_prompt_fails_the_image_and_not_the_encoder(rig: Rig) -> None:
    await rig.admit(rig.spec())
    first = await rig.step(Stage.ENCODE)
    assert isinstance(first, Advance)
    key = first.payload["text0"].decode()
    await rig.transport.put_cached(key, b"\xff" * 10, keep_s=60)
    await rig.admit(rig.spec(), name="again")
    with pytest.raises(GenerationError, match="malformed"):
        await rig.step(Stage.ENCODE)


async def test_broken_previews_are_dropped_and_the_next_one_is_shown(rig: Rig) -> None:
    payloads = [payload for name, payload in LATENTS.items() if name not in ("another size", "timings")]
    for payload in [*payloads, {"latents": codec.encode(GOOD)}]:
        await rig.transport.push_preview(PreviewTask(ImageRef("job", 0), 1, payload))
    decode = rig.handlers[Stage.DECODE]
    assert isinstance(decode, DecodeHandler)
    showing = asyncio.create_task(decode.show_previews(idle=lambda: True), name="previews")
    while not decode.counters["previews_total"] and not showing.done():  # noqa: ASYNC110 no event to wait for
        await asyncio.sleep(0.01)
    assert not showing.done()
    showing.cancel()
    assert decode.counters["previews_total"] == 1
