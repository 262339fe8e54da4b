"""The denoiser's gRPC surface: for direct use, tests and operators; the pictures come through the streams."""

from __future__ import annotations

import asyncio
from typing import Literal

import grpc.aio
import numpy as np

from streamflow.host.control import ControlServicer, StageControl
from streamflow.host.latest import Latest
from streamflow.rpc.errors import rpc_errors
from streamflow.rpc.server import Service
from streamflow.stages.denoiser import DenoiserStage
from streamflow.transport import codec
from streamflow.types import DenoiseJob, ModelCard, Tensors
from streamflow.v1 import denoiser_pb2, denoiser_pb2_grpc, encoder_pb2
from streamflow.validation import check_guidance_scale, check_sampler, check_size, check_steps

NAME = denoiser_pb2.DESCRIPTOR.services_by_name["Denoiser"].full_name

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
            progress: Latest[denoiser_pb2.DenoiseProgress] = Latest(interval_s=0.0)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_tell(progress, context), name="denoise progress")
                try:
                    latents = await self._stage.denoise(
                        job,
                        on_progress=lambda step, steps: progress.put(
                            denoiser_pb2.DenoiseProgress(step=step, steps=steps)
                        ),
                    )
                finally:
                    progress.close()
            await context.write(denoiser_pb2.DenoiseEvent(latents=codec.to_pb(latents)))


async def _tell(progress: Latest[denoiser_pb2.DenoiseProgress], context: Context) -> None:
    async for news in progress:
        await context.write(denoiser_pb2.DenoiseEvent(progress=news))


def read_job(request: denoiser_pb2.DenoiseRequest, card: ModelCard) -> DenoiseJob:
    """The job of a direct call; unset fields take the model's defaults. Raises InvalidRequestError."""
    width, height = request.width or card.default_width, request.height or card.default_height
    steps, sampler = request.steps or card.default_steps, request.sampler or card.default_sampler
    check_size(card, "width", width)
    check_size(card, "height", height)
    check_steps(card, steps)
    check_sampler(card, sampler)
    check_guidance_scale(request.guidance_scale)
    negative = request.negative_conditioning if request.HasField("negative_conditioning") else None
    return DenoiseJob(
        conditioning=_tensors(request.conditioning, "conditioning"),
        negative=None if negative is None else _tensors(negative, "negative_conditioning"),
        steps=steps,
        guidance_scale=request.guidance_scale,
        sampler=sampler,
        seed=request.seed,
        height=height,
        width=width,
        strength=request.strength if request.HasField("strength") else 1.0,
        init_latents=_array(request, "init_latents"),
        mask=_array(request, "mask"),
        noise=_array(request, "noise"),
    )


def _array(request: denoiser_pb2.DenoiseRequest, field: Literal["init_latents", "mask", "noise"]) -> np.ndarray | None:
    return codec.from_pb(getattr(request, field), field=field, finite=True) if request.HasField(field) else None


def _tensors(message: encoder_pb2.Conditioning, field: str) -> Tensors:
    return codec.tensors_from_pb(message, field=field, finite=True)


def service(stage: DenoiserStage, control: StageControl) -> Service:
    return Service(NAME, denoiser_pb2_grpc.add_DenoiserServicer_to_server, DenoiserServicer(stage, control))
