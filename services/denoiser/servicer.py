"""The denoiser's gRPC surface: for direct use, tests and operators; the pictures come through the streams."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import grpc.aio
import numpy as np

from streamflow.errors import InvalidRequestError
from streamflow.flow.programs import Role
from streamflow.flow.samplers import sampler_steps
from streamflow.host.control import ControlServicer, StageControl
from streamflow.host.latest import Latest, passed_on
from streamflow.rpc.convert import control_scale_from_pb, guidance_from_pb, true_cfg_scale, variant_from_pb
from streamflow.rpc.errors import rpc_errors
from streamflow.rpc.server import Service
from streamflow.stages.denoiser import DenoiserStage
from streamflow.transport import codec
from streamflow.types import DenoiseJob, JobChange, ModelCard, Tensors
from streamflow.v1 import denoiser_pb2, denoiser_pb2_grpc
from streamflow.validation import check_guidance, check_request_id, check_sampling, check_size, check_true_cfg_scale

NAME = denoiser_pb2.DESCRIPTOR.services_by_name["Denoiser"].full_name

_FIELDS: dict[Role, Literal["conditioning", "negative_conditioning", "source_conditioning"]] = {
    Role.TARGET: "conditioning",
    Role.NEGATIVE: "negative_conditioning",
    Role.SOURCE: "source_conditioning",
}

Context = grpc.aio.ServicerContext[denoiser_pb2.DenoiseRequest, denoiser_pb2.DenoiseEvent]


class DenoiserServicer(ControlServicer, denoiser_pb2_grpc.DenoiserServicer):
    """Denoises in the running batch that the stream entries join."""

    def __init__(self, stage: DenoiserStage, control: StageControl) -> None:
        super().__init__(control)
        self._stage = stage

    # Writing instead of yielding: a task group must not be suspended in a generator.
    async def Denoise(self, request: denoiser_pb2.DenoiseRequest, context: Context) -> None:
        async with rpc_errors(context):
            self._control.check_open()
            job = read_job(request, self._stage.card)
            if request.key:
                check_request_id(request.key, field="key")
            progress: Latest[denoiser_pb2.DenoiseEvent] = Latest(interval_s=0.0)
            previews: Latest[denoiser_pb2.DenoiseEvent] = Latest(interval_s=0.0)
            writing = asyncio.Lock()
            told = passed_on(*((news, _tell(news, context, writing)) for news in (progress, previews)))
            with self._control.worker.lend():
                async with told:
                    latents = await self._stage.denoise(
                        job,
                        key=request.key or None,
                        on_progress=lambda step, steps: progress.put(_progress(step, steps)),
                        on_preview=lambda step, latents: previews.put(_preview(step, latents)),
                    )
            await context.write(denoiser_pb2.DenoiseEvent(latents=codec.to_pb(latents)))

    async def Change(
        self, request: denoiser_pb2.ChangeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> denoiser_pb2.ChangeResponse:
        async with rpc_errors(context):
            await self._stage.change(request.key, read_change(request, self._stage.card))
            return denoiser_pb2.ChangeResponse()
        raise AssertionError("abort returned")


def _progress(step: int, steps: int) -> denoiser_pb2.DenoiseEvent:
    return denoiser_pb2.DenoiseEvent(progress=denoiser_pb2.DenoiseProgress(step=step, steps=steps))


def _preview(step: int, latents: np.ndarray) -> denoiser_pb2.DenoiseEvent:
    return denoiser_pb2.DenoiseEvent(preview=denoiser_pb2.DenoisePreview(step=step, latents=codec.to_pb(latents)))


async def _tell(news: Latest[denoiser_pb2.DenoiseEvent], context: Context, writing: asyncio.Lock) -> None:
    async for event in news:
        # A call carries one write at a time.
        async with writing:
            await context.write(event)


def read_job(request: denoiser_pb2.DenoiseRequest, card: ModelCard) -> DenoiseJob:
    """The job of a direct call; unset fields take the model's defaults. Raises InvalidRequestError."""
    width, height = request.width or card.default_width, request.height or card.default_height
    sampler = request.sampler or card.default_sampler
    steps = request.steps or sampler_steps(sampler, card.default_steps)
    check_size(card, "width", width)
    check_size(card, "height", height)
    guidance = guidance_from_pb(
        request.guidance_scale, request.guidance, card=card, true_cfg_scale=true_cfg_scale(request)
    )
    # The texts are not here: whether there is a negative one, its tensors say.
    negative = "given" if request.HasField("negative_conditioning") else ""
    check_true_cfg_scale(card, true_cfg_scale(request), negative)
    strength = request.strength if request.HasField("strength") else 1.0
    check_sampling(
        card,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        strength=strength if request.HasField("init_latents") else None,
        size_px=(width, height),
    )
    return DenoiseJob(
        conditioning=_texts(request),
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        seed=request.seed,
        height=height,
        width=width,
        strength=strength,
        init_latents=_array(request, "init_latents"),
        mask=_array(request, "mask"),
        noise=_array(request, "noise"),
        preview_interval_steps=request.preview_interval_steps,
        variant=variant_from_pb(request),
        control_image=_array(request, "control_image"),
        control_scale=control_scale_from_pb(request.control),
    )


def read_change(request: denoiser_pb2.ChangeRequest, card: ModelCard) -> JobChange:
    """Raises InvalidRequestError."""
    if request.HasField("guidance") and not request.HasField("guidance_scale"):
        raise InvalidRequestError("guidance", "options alone", "together with guidance_scale")
    if request.HasField("true_cfg_scale") and not request.HasField("guidance_scale"):
        raise InvalidRequestError("true_cfg_scale", request.true_cfg_scale, "together with guidance_scale")
    guidance = None
    if request.HasField("guidance_scale"):
        scale, true_scale = request.guidance_scale, true_cfg_scale(request)
        guidance = guidance_from_pb(scale, request.guidance, card=card, true_cfg_scale=true_scale)
        check_guidance(guidance)
    return JobChange(_texts(request) or None, guidance, request.strength if request.HasField("strength") else None)


def _texts(request: denoiser_pb2.DenoiseRequest | denoiser_pb2.ChangeRequest) -> dict[Role, Tensors]:
    return {
        role: codec.tensors_from_pb(getattr(request, field), field=field, finite=True)
        for role, field in _FIELDS.items()
        if request.HasField(field)
    }


def _array(
    request: denoiser_pb2.DenoiseRequest, field: Literal["init_latents", "mask", "noise", "control_image"]
) -> np.ndarray | None:
    return codec.from_pb(getattr(request, field), field=field, finite=True) if request.HasField(field) else None


def service(stage: DenoiserStage, control: StageControl) -> Service:
    return Service(NAME, denoiser_pb2_grpc.add_DenoiserServicer_to_server, DenoiserServicer(stage, control))
