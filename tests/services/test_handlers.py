"""One image on its way through the three handlers: real stages, an in-memory transport."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.decoder.handler import DecodeHandler
from services.denoiser.handler import DenoiseHandler
from services.encoder.handler import EncodeHandler
from streamflow.errors import GenerationError, UnavailableError
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.host import handoff
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.imaging import decode_rgb, encode_image
from streamflow.transport import codec
from streamflow.transport.base import ImageRef, NewJob, PreviewTask
from streamflow.transport.handling import Advance, Finish
from streamflow.types import DecoderKind, DenoiseJob, EncodeJob, ImageFormat, JobState, SlotState, Stage
from streamflow.v1 import gateway_pb2, types_pb2
from tests.services.conftest import WORKER, Rig, Stages

pytestmark = pytest.mark.asyncio(loop_scope="module")

PICTURE = np.stack(np.broadcast_arrays(np.arange(64)[None, :] * 3, np.arange(64)[:, None] * 3, 90), -1).astype(np.uint8)
MASK = np.zeros((64, 64), np.uint8)
MASK[:, 32:] = 255


async def through(rig: Rig) -> types_pb2.StoredImage:
    for stage in (Stage.ENCODE, Stage.DENOISE):
        assert isinstance(await rig.step(stage), Advance)
    outcome = await rig.step(Stage.DECODE)
    assert isinstance(outcome, Finish)
    assert isinstance(outcome.result, bytes)
    return types_pb2.StoredImage.FromString(outcome.result)


async def test_a_guided_image_equals_what_the_stages_make_by_themselves(rig: Rig, stages: Stages) -> None:
    spec = rig.spec(prompts=["a", "b"], num_images=2, negative_prompt="no", guidance_scale=3.0, seed=2**64 - 2)
    await rig.transport.admit(NewJob("many", "digest", spec.SerializeToString(), num_images=4))
    entries = await rig.transport.read(Stage.ENCODE, "w", 4)
    # Image 3 of 2 x 2 has the second prompt, and its seed has wrapped round.
    [entry] = [entry for entry in entries if entry.ref.index == 3]
    encoded = await rig.handle(entry)
    assert isinstance(encoded, Advance)
    await rig.transport.advance(entry, encoded.to, encoded.payload)
    assert isinstance(await rig.step(Stage.DENOISE), Advance)
    outcome = await rig.step(Stage.DECODE)
    assert isinstance(outcome, Finish)
    assert isinstance(outcome.result, bytes)
    stored = types_pb2.StoredImage.FromString(outcome.result)

    [alone] = stages.encoder.encode([EncodeJob({Role.TARGET: "b", Role.NEGATIVE: "no"})])
    for role, tensors in alone.conditioning.items():
        kept = await rig.transport.get_cached(encoded.payload[handoff.text_field(role)].decode(), keep_s=1)
        assert kept is not None
        np.testing.assert_allclose(codec.decode_tensors(kept)["prompt_embeds"], tensors["prompt_embeds"], atol=1e-5)
    job = DenoiseJob(alone.conditioning, 2, Guidance(3.0), "euler", 1, 64, 64)
    latents = DenoiserStage(stages.denoiser._denoiser).run([job])
    pixels = stages.decoder.decode(np.stack(latents), DecoderKind.TINY)[0]
    assert np.abs(decode_rgb(stored.data, size=(64, 64)).astype(int) - pixels).max() <= 1

    info = stored.info
    assert (info.index, info.seed, info.steps, info.guidance_scale, info.sampler) == (3, 1, 2, 3.0, "euler")
    assert (info.width, info.height, info.format) == (64, 64, types_pb2.IMAGE_FORMAT_PNG)
    assert (info.model, info.model_revision) == (rig.card.name, rig.card.revision)
    assert info.decoder == types_pb2.DECODER_KIND_TINY


async def test_timings_add_up_to_no_more_than_the_job_took(rig: Rig) -> None:
    ref = await rig.admit(rig.spec())
    timings = (await through(rig)).info.timings
    job = await rig.transport.job(ref.job_id)
    assert job.state is JobState.IMAGES
    assert job.finished_at_s is not None
    assert min(timings.encode_ms, timings.denoise_ms, timings.decode_ms) > 0
    total_ms = timings.waiting_ms + timings.encode_ms + timings.denoise_ms + timings.decode_ms
    assert total_ms <= (job.finished_at_s - job.admitted_at_s) * 1000 + 5


async def test_init_image_and_mask_keep_what_lies_outside_the_mask(rig: Rig, stages: Stages) -> None:
    spec = rig.spec(strength=1.0)
    spec.init_image_blob = await rig.transport.put_blob(encode_image(PICTURE, ImageFormat.PNG), keep_s=60)
    spec.mask_blob = await rig.transport.put_blob(png_of(MASK), keep_s=60)
    await rig.admit(spec)
    encoded = await rig.step(Stage.ENCODE)
    assert isinstance(encoded, Advance)
    init = codec.decode(await rig.transport.get_blob(encoded.payload["init"].decode()) or b"")
    mask = codec.decode(await rig.transport.get_blob(encoded.payload["mask"].decode()) or b"")
    assert np.array_equal(mask, np.repeat([[0.0] * 8 + [1.0] * 8], 16, axis=0))
    [alone] = stages.encoder.encode([EncodeJob({Role.TARGET: "a red"}, init_image=PICTURE)])
    np.testing.assert_allclose(init, alone.init_latents, atol=1e-5)

    denoised = await rig.step(Stage.DENOISE)
    assert isinstance(denoised, Advance)
    latents = codec.decode(denoised.payload["latents"])
    np.testing.assert_allclose(latents[:, :, :8], init[:, :, :8], atol=1e-5)
    assert np.abs(latents[:, :, 8:] - init[:, :, 8:]).max() > 0.1

    finished = await rig.step(Stage.DECODE)
    assert isinstance(finished, Finish)
    assert isinstance(finished.result, bytes)
    pixels = decode_rgb(types_pb2.StoredImage.FromString(finished.result).data, size=(64, 64))
    assert np.array_equal(pixels[:, :32], PICTURE[:, :32])
    assert not np.array_equal(pixels[:, 32:], PICTURE[:, 32:])


def png_of(gray: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    return file.getvalue()


async def test_a_prompt_is_encoded_once_and_its_warning_is_kept_with_it(rig: Rig) -> None:
    warnings = []
    for name in ("first", "second"):
        await rig.admit(rig.spec(prompts=["abcdefghijklmnop"]), name=name)
        outcome = await rig.step(Stage.ENCODE)
        assert isinstance(outcome, Advance)
        warnings.append(outcome.warnings)
    handler = rig.handlers[Stage.ENCODE]
    assert isinstance(handler, EncodeHandler)
    assert handler.counters == {"prompt_cache_misses_total": 1, "prompt_cache_hits_total": 1}
    assert warnings[0] == warnings[1]
    assert warnings[0][0].startswith("the prompt is longer than 12 tokens")
    assert (await rig.transport.job("first")).warnings == warnings[0]


async def test_missing_tensors_send_the_image_back_and_it_ends_well(rig: Rig) -> None:
    await rig.admit(rig.spec())
    await rig.step(Stage.ENCODE)
    rig.transport._kept.clear()
    sent_back = await rig.step(Stage.DENOISE)
    assert isinstance(sent_back, Advance)
    assert sent_back.to is Stage.ENCODE
    stored = await through(rig)
    handler = rig.handlers[Stage.DENOISE]
    assert isinstance(handler, DenoiseHandler)
    assert handler.counters["sent_back_total"] == 1
    assert decode_rgb(stored.data, size=(64, 64)).shape == (64, 64, 3)


async def test_an_image_whose_tensors_are_gone_every_time_ends_with_an_error(rig: Rig) -> None:
    await rig.admit(rig.spec())
    for _ in range(handoff.MAX_RETURNS):
        await rig.step(Stage.ENCODE)
        rig.transport._kept.clear()
        await rig.step(Stage.DENOISE)
    await rig.step(Stage.ENCODE)
    rig.transport._kept.clear()
    with pytest.raises(GenerationError, match="does not fit into the cache"):
        await rig.step(Stage.DENOISE)


async def test_missing_latents_send_the_image_back(rig: Rig) -> None:
    entry = await rig.forge(Stage.DECODE, {handoff.LATENTS + handoff.BLOB: b"0" * 64})
    outcome = await rig.handle(entry)
    assert isinstance(outcome, Advance)
    assert outcome.to is Stage.ENCODE


async def test_large_latents_travel_by_reference(rig: Rig) -> None:
    latents = np.random.default_rng(0).standard_normal((4, 160, 160), np.float32)
    payload = await handoff.pack_latents(rig.transport, latents, keep_s=60)
    assert set(payload) == {handoff.LATENTS + handoff.BLOB}
    assert len(payload[handoff.LATENTS + handoff.BLOB]) == 64
    unpacked = await handoff.unpack_latents(rig.transport, payload)
    assert unpacked is not None
    assert np.array_equal(unpacked, latents)
    small = await handoff.pack_latents(rig.transport, latents[:, :16, :16], keep_s=60)
    assert set(small) == {handoff.LATENTS}


async def test_progress_and_previews_are_published_and_the_last_step_always_is(rig: Rig) -> None:
    spec = rig.spec(steps=20, preview_interval_steps=1)
    ref = await rig.admit(spec)
    decode = rig.handlers[Stage.DECODE]
    assert isinstance(decode, DecodeHandler)
    async with rig.transport.subscribe(ref.job_id) as wakes:
        await rig.step(Stage.ENCODE)
        await rig.step(Stage.DENOISE)
        showing = asyncio.create_task(decode.show_previews(idle=lambda: True), name="previews")
        events: list[gateway_pb2.GenerateEvent] = []
        async for published in wakes:
            if published:
                events.append(gateway_pb2.GenerateEvent.FromString(published))
            if events and events[-1].HasField("preview"):
                break
        showing.cancel()
    steps = [event.progress.step for event in events if event.HasField("progress")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    preview = events[-1].preview
    assert (preview.index, preview.width, preview.height) == (0, 64, 64)
    assert 0 < preview.step < 20
    assert Image.open(io.BytesIO(preview.data)).format == "JPEG"


async def test_previews_wait_while_there_is_work(rig: Rig) -> None:
    payload = {handoff.LATENTS: codec.encode(np.zeros((4, 16, 16), np.float32))}
    await rig.transport.push_preview(PreviewTask(ImageRef("job", 0), 1, payload))
    decode = rig.handlers[Stage.DECODE]
    assert isinstance(decode, DecodeHandler)
    asked = asyncio.Event()

    def idle() -> bool:
        asked.set()
        return False

    showing = asyncio.create_task(decode.show_previews(idle=idle), name="previews")
    await asked.wait()
    showing.cancel()
    await asyncio.wait([showing])
    assert await rig.transport.pop_preview() is not None


async def test_cancelling_the_handler_frees_the_slot(rig: Rig, stages: Stages) -> None:
    await rig.admit(rig.spec(steps=100))
    await rig.step(Stage.ENCODE)
    denoiser = stages.denoiser
    before = denoiser.counters["ticks_total"]
    working = asyncio.create_task(rig.handle(await rig.next(Stage.DENOISE)), name="denoise")
    while denoiser.counters["ticks_total"] == before:  # noqa: ASYNC110 the engine's counters have no event
        await asyncio.sleep(0.001)
    assert denoiser.slots_in_use == 1
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert denoiser.slots_in_use == 0


async def test_direct_calls_that_hold_every_slot_are_no_fault_of_an_image_that_waits(rig: Rig, stages: Stages) -> None:
    await rig.admit(rig.spec())
    await rig.step(Stage.ENCODE)
    entry, denoiser = await rig.next(Stage.DENOISE), stages.denoiser
    [encoded] = stages.encoder.encode([EncodeJob({Role.TARGET: "a red"})])
    endless = DenoiseJob(encoded.conditioning, 1000, Guidance(1.0), "euler", 0, 64, 64)
    async with asyncio.TaskGroup() as tasks:
        direct = [tasks.create_task(denoiser.denoise(endless)) for _ in range(denoiser.slots)]
        waiting = tasks.create_task(rig.handle(entry, progress_timeout_s=0.3))
        await asyncio.wait({waiting}, timeout=1.0)
        assert not waiting.done()
        direct[0].cancel()
        assert isinstance(await waiting, Advance)
        for task in direct:
            task.cancel()


async def test_an_image_that_ends_the_engine_loses_an_attempt(
    rig: Rig, sd_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.admit(rig.spec())
    await rig.step(Stage.ENCODE)

    def lost(report: object) -> None:
        raise RuntimeError("the device is lost")

    # The thread's own traceback goes to the hook for threads, which the tests would take for a failure.
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    async with DenoiserStage.load(sd_checkpoint, device="cpu", slots=1) as stage:
        monkeypatch.setattr(stage._engine, "_retire", lost)
        rig.handlers[Stage.DENOISE] = DenoiseHandler(stage, rig.transport)
        # Any error but "unavailable", with which a worker would hand it back as if nothing had happened.
        with pytest.raises(RuntimeError, match="the device is lost"):
            await rig.handle(await rig.next(Stage.DENOISE))


@pytest.mark.parametrize("inline_bytes", [handoff.MAX_INLINE_BYTES, 100])
async def test_another_denoiser_goes_on_where_one_was_suspended(
    rig: Rig, stages: Stages, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    monkeypatch.setattr(handoff, "MAX_INLINE_BYTES", inline_bytes)
    spec = rig.spec(steps=60, sampler="pseudo", guidance_scale=2.0, negative_prompt="no")
    await rig.admit(spec, name="whole")
    whole = await through(rig)
    await rig.admit(spec)
    await rig.step(Stage.ENCODE)
    counters = []
    async with DenoiserStage(stages.denoiser._denoiser, slots=2) as leaving:
        handler = rig.handlers[Stage.DENOISE] = DenoiseHandler(leaving, rig.transport)
        working = asyncio.create_task(rig.step(Stage.DENOISE))
        while not leaving.counters["ticks_total"]:  # noqa: ASYNC110 the engine's counters have no event
            await asyncio.sleep(0.001)
        handler.suspend()
        outcome = await working
        assert isinstance(outcome, Advance)
        assert outcome.to is Stage.DENOISE
        with pytest.raises(UnavailableError, match="another replica"):
            await rig.handle(replace(await rig.next(Stage.DENOISE), id="late"))
        counters.append(leaving.counters)
        await rig.transport.hand_back(Stage.DENOISE, WORKER, None, count_attempt=False)
    async with DenoiserStage(stages.denoiser._denoiser, slots=2) as next_one:
        rig.handlers[Stage.DENOISE] = DenoiseHandler(next_one, rig.transport)
        outcome = await rig.step(Stage.DENOISE)
        assert isinstance(outcome, Advance)
        assert outcome.to is Stage.DECODE
        assert not {handoff.STATE, handoff.STATE + handoff.BLOB, handoff.DONE} & outcome.payload.keys()
        counters.append(next_one.counters)
    assert 0 < counters[0]["evaluations_total"] < 61
    # A pseudo corrector of 60 steps takes 61 evaluations.
    assert sum(one["evaluations_total"] for one in counters) == 61
    finished = await rig.step(Stage.DECODE)
    assert isinstance(finished, Finish)
    assert isinstance(finished.result, bytes)
    assert types_pb2.StoredImage.FromString(finished.result).data == whole.data


async def test_what_another_version_left_is_begun_anew(rig: Rig) -> None:
    await rig.admit(rig.spec())
    await rig.step(Stage.ENCODE)
    entry = await rig.next(Stage.DENOISE)
    expected = await rig.handle(entry)
    zeros = np.zeros(handoff.latent_shape(rig.card, width=64, height=64), np.float32)
    state = await handoff.pack_state(rig.transport, SlotState(zeros, zeros, 1, 9), keep_s=9)
    again = await rig.handle(replace(entry, payload={**entry.payload, **state}))
    assert isinstance(expected, Advance)
    assert isinstance(again, Advance)
    assert again.payload[handoff.LATENTS] == expected.payload[handoff.LATENTS]


async def test_output_options_reach_the_file_and_metadata_holds_no_prompt(rig: Rig) -> None:
    output = types_pb2.OutputOptions(
        format=types_pb2.IMAGE_FORMAT_WEBP, quality=50, decoder=types_pb2.DECODER_KIND_FULL, embed_metadata=True
    )
    await rig.admit(rig.spec(output=output))
    stored = await through(rig)
    image = Image.open(io.BytesIO(stored.data))
    assert image.format == "WEBP"
    assert (stored.info.format, stored.info.decoder) == (output.format, output.decoder)
    metadata = json.loads(image.getexif()[0x010E])
    assert metadata["seed"] == 7
    assert b"a red" not in stored.data
    assert "prompt" not in metadata


async def test_metadata_says_all_that_makes_the_image_again(rig: Rig) -> None:
    mode = types_pb2.GuidanceOptions(mode=types_pb2.GUIDANCE_MODE_SELF_NEGATIVE, residual_strength=0.7)
    interval = types_pb2.GuidanceOptions(start_sigma=0.9, end_sigma=0.2)
    plain = await embedded(rig, rig.spec())
    assert "strength" not in plain
    blob = await rig.transport.put_blob(encode_image(PICTURE, ImageFormat.PNG), keep_s=60)
    for fields, more in (
        ({"guidance": mode}, {"guidance_mode": "self-negative", "residual_strength": 0.7}),
        ({"guidance": interval}, {"guidance_interval": [0.9, 0.2]}),
        ({"strength": 0.6}, {"strength": 0.6}),
    ):
        spec = rig.spec(**fields)
        spec.init_image_blob = blob if "strength" in fields else ""
        assert await embedded(rig, spec) == plain | more


async def embedded(rig: Rig, spec: types_pb2.JobSpec) -> dict[str, object]:
    """What a file of this image says of its making."""
    spec.request.output.embed_metadata = True
    await rig.admit(spec, name=hashlib.sha256(spec.SerializeToString()).hexdigest())
    stored = await through(rig)
    return dict(json.loads(Image.open(io.BytesIO(stored.data)).info["streamflow"]))


async def test_a_strength_that_leaves_no_step_is_no_specification(rig: Rig) -> None:
    spec = rig.spec(strength=0.1)
    spec.init_image_blob = await rig.transport.put_blob(encode_image(PICTURE, ImageFormat.PNG), keep_s=60)
    await rig.admit(spec)
    with pytest.raises(GenerationError, match="strength"):
        await rig.step(Stage.ENCODE)


async def test_an_entry_is_stale_once_another_finished_it(rig: Rig) -> None:
    await rig.admit(rig.spec())
    entry = await rig.next(Stage.ENCODE)
    outcome = await rig.handle(entry)
    assert isinstance(outcome, Advance)
    assert await rig.transport.advance(entry, outcome.to, outcome.payload)
    assert not await rig.transport.advance(replace(entry), outcome.to, outcome.payload)
