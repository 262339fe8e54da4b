"""The gRPC surface of each stage: a real server and channel around the running stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio

from services.decoder import servicer as decoder
from services.denoiser import servicer as denoiser
from services.encoder import servicer as encoder
from streamflow.config import StageSettings
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.host.control import StageControl
from streamflow.rpc.server import RpcServer
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.imaging import decode_rgb, encode_image
from streamflow.transport import codec
from streamflow.types import DecoderKind, DenoiseJob, ImageFormat, Stage
from streamflow.v1 import (
    decoder_pb2,
    decoder_pb2_grpc,
    denoiser_pb2,
    denoiser_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    types_pb2,
)
from tests.services.conftest import Rig, Stages

pytestmark = pytest.mark.asyncio(loop_scope="module")
PICTURE = np.stack(np.broadcast_arrays(np.arange(64)[None, :] * 3, np.arange(64)[:, None] * 3, 90), -1).astype(np.uint8)


@asynccontextmanager
async def served(rig: Rig, stages: Stages, stage: Stage) -> AsyncIterator[tuple[grpc.aio.Channel, StageControl]]:
    """One stage's service with its worker, not reading from any stream yet."""
    module = {Stage.ENCODE: encoder, Stage.DENOISE: denoiser, Stage.DECODE: decoder}[stage]
    hosted: Any = {Stage.ENCODE: stages.encoder, Stage.DENOISE: stages.denoiser, Stage.DECODE: stages.decoder}[stage]
    settings = StageSettings(drain_grace_s=0.0)
    control = StageControl(
        stage,
        hosted=hosted,
        handler=rig.handlers[stage],  # type: ignore[arg-type]
        transport=rig.transport,
        settings=settings,
        device="cpu",
    )
    async with RpcServer(settings, services=[module.service(hosted, control)]) as server:
        control.address = server.address
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield channel, control


@pytest_asyncio.fixture(loop_scope="module")
async def text_encoder(rig: Rig, stages: Stages) -> AsyncIterator[encoder_pb2_grpc.TextEncoderStub]:
    async with served(rig, stages, Stage.ENCODE) as (channel, _):
        yield encoder_pb2_grpc.TextEncoderStub(channel)


async def test_encode_gives_what_the_stage_gives(
    text_encoder: encoder_pb2_grpc.TextEncoderStub, stages: Stages
) -> None:
    jpeg = encode_image(np.repeat(np.repeat(PICTURE, 2, 0), 2, 1), ImageFormat.PNG)
    request = encoder_pb2.EncodeRequest(prompts=["a", "abcdefghijklmnop"], init_image=jpeg, width=64, height=32)
    response = await text_encoder.Encode(request)
    [short, long] = response.conditionings
    expected = (await stages.encoder.encode_text("a")).conditioning["prompt_embeds"]
    np.testing.assert_allclose(codec.tensors_from_pb(short)["prompt_embeds"], expected, atol=1e-5)
    assert short.truncated == ""
    assert long.truncated.replace(" ", "") == "klmnop"
    assert codec.from_pb(response.init_latents).shape == (4, 8, 16)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (encoder_pb2.EncodeRequest(), "prompts"),
        (encoder_pb2.EncodeRequest(prompts=["a"] * 65), "prompts"),
        (encoder_pb2.EncodeRequest(prompts=["a\0"]), "prompts"),
        (encoder_pb2.EncodeRequest(init_image=b"x", width=64, height=63), "height"),
        (encoder_pb2.EncodeRequest(init_image=b"GIF89a", width=64, height=64), "image"),
    ],
    ids=["nothing", "too many", "NUL", "odd size", "another format"],
)
async def test_encode_names_what_is_wrong(
    text_encoder: encoder_pb2_grpc.TextEncoderStub, request_: encoder_pb2.EncodeRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: got") as caught:
        await text_encoder.Encode(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


SOURCE = {"init_latents": codec.to_pb(np.zeros((4, 16, 16), np.float32))}


def denoise_request(**fields: Any) -> denoiser_pb2.DenoiseRequest:
    embeds = np.random.default_rng(0).standard_normal((12, 16), np.float32)
    defaults = {"conditioning": codec.tensors_to_pb({"prompt_embeds": embeds}), "steps": 3, "seed": 5}
    return denoiser_pb2.DenoiseRequest(**defaults | fields)


async def test_denoise_streams_progress_and_ends_with_the_latents(rig: Rig, stages: Stages) -> None:
    request = denoise_request(guidance_scale=2.0, negative_conditioning=denoise_request().conditioning)
    async with served(rig, stages, Stage.DENOISE) as (channel, _):
        events = [event async for event in denoiser_pb2_grpc.DenoiserStub(channel).Denoise(request)]
    assert [event.WhichOneof("event") for event in events[-2:]] == ["progress", "latents"]
    assert (events[-2].progress.step, events[-2].progress.steps) == (3, 3)
    embeds = codec.tensors_from_pb(request.conditioning)
    job = DenoiseJob({Role.TARGET: embeds, Role.NEGATIVE: embeds}, 3, Guidance(2.0), "euler", 5, 64, 64)
    [alone] = DenoiserStage(stages.denoiser._denoiser).run([job])
    np.testing.assert_allclose(codec.from_pb(events[-1].latents), alone, atol=1e-4)


async def test_a_change_reaches_the_image_that_is_made(rig: Rig, stages: Stages) -> None:
    text = denoise_request(sampler="heun", steps=50, key="live").conditioning
    async with served(rig, stages, Stage.DENOISE) as (channel, _):
        stub = denoiser_pb2_grpc.DenoiserStub(channel)
        call = stub.Denoise(denoise_request(steps=50, key="live", preview_interval_steps=10))
        seen, last = set(), denoiser_pb2.DenoiseEvent()
        async for event in call:
            if not seen:
                await stub.Change(
                    denoiser_pb2.ChangeRequest(key="live", negative_conditioning=text, guidance_scale=2.0)
                )
            seen.add(event.WhichOneof("event"))
            last = event
        assert seen == {"progress", "preview", "latents"}
        assert codec.from_pb(last.latents).shape == (4, 16, 16)
        for request, code in (
            (denoiser_pb2.ChangeRequest(key="live", guidance_scale=2.0), grpc.StatusCode.NOT_FOUND),
            (denoiser_pb2.ChangeRequest(key="live", guidance_scale=-2.0), grpc.StatusCode.INVALID_ARGUMENT),
            (
                denoiser_pb2.ChangeRequest(key="live", guidance=types_pb2.GuidanceOptions(end_sigma=0.5)),
                grpc.StatusCode.INVALID_ARGUMENT,
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Change(request)
            assert caught.value.code() is code


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conditioning": encoder_pb2.Conditioning()}, "conditioning"),
        ({"key": "a b"}, "key"),
        ({"sampler": "R3"}, "a first block"),
        ({"guidance": types_pb2.GuidanceOptions(start_sigma=0.2, end_sigma=0.5)}, "guidance_interval"),
        ({"guidance_scale": 2.0}, "negative"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"steps": 10_000}, "steps"),
        ({"width": 2**31}, "width"),
        ({"sampler": "no-such"}, "sampler"),
        ({"noise": codec.to_pb(np.full((4, 16, 16), np.inf, np.float32))}, "noise"),
        ({"noise": codec.to_pb(np.zeros((4, 16, 8), np.float32))}, "noise"),
        ({"mask": codec.to_pb(np.zeros((16, 16), np.float32))}, "mask"),
        ({"init_latents": types_pb2.Tensor(dtype="object")}, "init_latents"),
        ({"guidance": types_pb2.GuidanceOptions(mode=99)}, "guidance.mode"),  # type: ignore[arg-type]
        ({**SOURCE, "mask": codec.to_pb(np.full((16, 16), 255, np.uint8))}, "mask"),
        ({**SOURCE, "mask": codec.to_pb(np.full((16, 16), -0.5, np.float32))}, "mask"),
    ],
)
async def test_denoise_names_what_is_wrong(rig: Rig, stages: Stages, fields: dict[str, Any], message: str) -> None:
    async with served(rig, stages, Stage.DENOISE) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            async for _event in denoiser_pb2_grpc.DenoiserStub(channel).Denoise(denoise_request(**fields)):
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert stages.denoiser.slots_in_use == 0


async def test_an_image_that_fails_while_its_events_are_written_ends_its_call(rig: Rig, stages: Stages) -> None:
    huge = codec.to_pb(np.full((4, 16, 16), 3e38, np.float32))
    async with served(rig, stages, Stage.DENOISE) as (channel, _):
        stub = denoiser_pb2_grpc.DenoiserStub(channel)
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError, match="not finite") as caught:
                async for _event in stub.Denoise(denoise_request(steps=1, noise=huge), timeout=10):
                    pass
            assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_decode_gives_what_the_stage_gives(rig: Rig, stages: Stages) -> None:
    latents = np.random.default_rng(1).standard_normal((4, 16, 8), np.float32)
    output = types_pb2.OutputOptions(decoder=types_pb2.DECODER_KIND_FULL)
    async with served(rig, stages, Stage.DECODE) as (channel, _):
        stub = decoder_pb2_grpc.DecoderStub(channel)
        response = await stub.Decode(decoder_pb2.DecodeRequest(latents=codec.to_pb(latents), output=output))
        assert (response.width, response.height, response.format) == (32, 64, types_pb2.IMAGE_FORMAT_PNG)
        pixels = stages.decoder.decode(latents[None], DecoderKind.FULL)[0]
        assert np.abs(decode_rgb(response.data, size=(32, 64)).astype(int) - pixels).max() <= 1
        latents[0, 0, 0] = np.nan
        for bad in (
            decoder_pb2.DecodeRequest(latents=codec.to_pb(latents)),
            decoder_pb2.DecodeRequest(),
            decoder_pb2.DecodeRequest(latents=codec.to_pb(latents[:3] * 0)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Decode(bad)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_drain_ends_the_worker_refuses_calls_and_shows_in_the_status(rig: Rig, stages: Stages) -> None:
    await rig.admit(rig.spec())
    async with served(rig, stages, Stage.ENCODE) as (channel, control), asyncio.TaskGroup() as tasks:
        stub = encoder_pb2_grpc.TextEncoderStub(channel)
        status = await stub.Status(types_pb2.StatusRequest())
        assert (status.stage, status.backlog, status.draining) == ("encoder", 1, False)
        assert (status.model, status.model_revision) == (rig.card.name, rig.card.revision)
        assert status.slots == stages.encoder.slots
        working = tasks.create_task(control.worker.run(), name="worker")
        await rig.next(Stage.DENOISE)
        for grace_s in (-1.0, float("nan"), float("inf")):
            with pytest.raises(grpc.aio.AioRpcError, match="grace_s: got"):
                await stub.Drain(types_pb2.DrainRequest(grace_s=grace_s))
        assert await stub.Drain(types_pb2.DrainRequest(grace_s=1.0)) == types_pb2.DrainResponse()
        await working
        with pytest.raises(grpc.aio.AioRpcError, match="draining") as caught:
            await stub.Encode(encoder_pb2.EncodeRequest(prompts=["a"]))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        drained = await stub.Status(types_pb2.StatusRequest())
        assert (drained.draining, drained.counters["ended_total"]) == (True, 1)
