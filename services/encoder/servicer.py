"""The encoder's gRPC surface: for direct use, tests and operators; the pictures come through the streams."""

from __future__ import annotations

import asyncio

import grpc.aio

from streamflow.errors import InvalidRequestError
from streamflow.host.control import ControlServicer, StageControl
from streamflow.pictures import load_source
from streamflow.rpc.convert import adapters_from_pb
from streamflow.rpc.errors import rpc_errors
from streamflow.rpc.server import Service
from streamflow.stages.encoder import EncoderStage
from streamflow.transport import codec
from streamflow.v1 import encoder_pb2, encoder_pb2_grpc, types_pb2
from streamflow.validation import check_count, check_prompt, check_size

NAME = encoder_pb2.DESCRIPTOR.services_by_name["TextEncoder"].full_name
MAX_PROMPTS = 64
MAX_PROMPT_CHARS = 100_000

Context = grpc.aio.ServicerContext[encoder_pb2.EncodeRequest, encoder_pb2.EncodeResponse]


class EncoderServicer(ControlServicer, encoder_pb2_grpc.TextEncoderServicer):
    """Encodes prompts and init images in the batches that the stream entries go into."""

    def __init__(self, stage: EncoderStage, control: StageControl) -> None:
        super().__init__(control)
        self._stage = stage

    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Context) -> encoder_pb2.EncodeResponse:
        async with rpc_errors(context):
            self._control.check_open()
            _check_prompts(request)
            adapters = adapters_from_pb(request.adapters)
            texts = await asyncio.gather(*(self._stage.encode_text(one, adapters) for one in request.prompts))
            conditionings = [codec.tensors_to_pb(text.conditioning, truncated=text.truncated) for text in texts]
            latents = await self._init_latents(request) if request.init_image else None
            return encoder_pb2.EncodeResponse(conditionings=conditionings, init_latents=latents)
        raise AssertionError("abort returned")

    async def _init_latents(self, request: encoder_pb2.EncodeRequest) -> types_pb2.Tensor:
        check_size(self._stage.card, "width", request.width)
        check_size(self._stage.card, "height", request.height)
        size = (request.width, request.height)
        source = await asyncio.to_thread(load_source, request.init_image, size=size)
        return codec.to_pb(await self._stage.encode_image(source.image))


def _check_prompts(request: encoder_pb2.EncodeRequest) -> None:
    if not request.prompts and not request.init_image:
        raise InvalidRequestError("prompts", [], "one prompt or more, an init_image, or both")
    if request.prompts:
        check_count("prompts", len(request.prompts), MAX_PROMPTS)
    for prompt in request.prompts:
        check_prompt("prompts", prompt, max_chars=MAX_PROMPT_CHARS, may_be_empty=True)


def service(stage: EncoderStage, control: StageControl) -> Service:
    return Service(NAME, encoder_pb2_grpc.add_TextEncoderServicer_to_server, EncoderServicer(stage, control))
