"""The decoder's gRPC surface: for direct use, tests and operators; the pictures come through the streams."""

from __future__ import annotations

import grpc.aio

from streamflow.errors import InvalidRequestError
from streamflow.host.control import ControlServicer, StageControl
from streamflow.host.request import checked_output
from streamflow.rpc.convert import format_to_pb
from streamflow.rpc.errors import rpc_errors
from streamflow.rpc.server import Service
from streamflow.stages.decoder import DecoderStage
from streamflow.transport import codec
from streamflow.types import OutputSpec
from streamflow.v1 import decoder_pb2, decoder_pb2_grpc

NAME = decoder_pb2.DESCRIPTOR.services_by_name["Decoder"].full_name

Context = grpc.aio.ServicerContext[decoder_pb2.DecodeRequest, decoder_pb2.DecodeResponse]


class DecoderServicer(ControlServicer, decoder_pb2_grpc.DecoderServicer):
    """Decodes latents in the batches that the stream entries go into."""

    def __init__(self, stage: DecoderStage, control: StageControl) -> None:
        super().__init__(control)
        self._stage = stage

    async def Decode(self, request: decoder_pb2.DecodeRequest, context: Context) -> decoder_pb2.DecodeResponse:
        async with rpc_errors(context):
            self._control.check_open()
            output = self._output(request)
            latents = codec.from_pb(request.latents, field="latents", finite=True)
            metadata = {"model": self._stage.card.name, "model_revision": self._stage.card.revision}
            data = await self._stage.submit(latents, output, metadata=metadata)
            height, width = (size * self._stage.card.latent_factor for size in latents.shape[1:])
            return decoder_pb2.DecodeResponse(data=data, format=format_to_pb(output.format), width=width, height=height)
        raise AssertionError("abort returned")

    def _output(self, request: decoder_pb2.DecodeRequest) -> OutputSpec:
        try:
            return checked_output(request.output, self._stage.card)
        except InvalidRequestError:
            raise
        except ValueError as error:
            raise InvalidRequestError("output", str(error), "values that the proto file lists") from error


def service(stage: DecoderStage, control: StageControl) -> Service:
    return Service(NAME, decoder_pb2_grpc.add_DecoderServicer_to_server, DecoderServicer(stage, control))
