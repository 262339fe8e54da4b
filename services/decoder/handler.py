"""What an entry of the decode stream becomes: a stored picture. Previews, too, while there is nothing to decode."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import numpy as np

from streamflow.errors import StreamFlowError
from streamflow.flow.guidance import Guidance
from streamflow.host import handoff
from streamflow.host.handoff import Stopwatch, malformed
from streamflow.host.request import ImageRequest, read_request
from streamflow.host.sources import stored_source
from streamflow.rpc.convert import decoder_to_pb, format_to_pb, preview_event
from streamflow.stages.decoder import DecoderStage
from streamflow.telemetry import get_logger
from streamflow.transport.base import Entry, PreviewTask, Transport
from streamflow.transport.handling import EntryContext, Finish, Outcome
from streamflow.v1 import types_pb2

LOOK_AGAIN_S = 0.2

_log = get_logger(__name__)


class DecodeHandler:
    """Decodes one image and makes what is stored of it.

    Args:
        stage: entered by the caller.
        transport: where latents are fetched and previews published.
    """

    def __init__(self, stage: DecoderStage, transport: Transport) -> None:
        self._stage, self._transport = stage, transport
        self.counters = Counter({"sent_back_total": 0, "previews_total": 0})

    async def __call__(self, context: EntryContext) -> Outcome:
        """Finishes the image, or sends it back to the encoder when its latents are gone.

        Raises:
            GenerationError: the entry cannot be read, or its latents are not finite.
        """
        entry = context.entry
        with malformed(entry):
            watch = Stopwatch(entry)
        spec = await self._transport.spec(entry.ref.job_id)
        request = read_request(spec, entry.ref.index, self._stage.card)
        with malformed(entry):
            latents = await handoff.unpack_latents(self._transport, entry.payload)
        if latents is None:
            self.counters["sent_back_total"] += 1
            return handoff.send_back(entry, watch.stop("decode"))
        self._check_shape(entry, request, latents)
        # An autoencoder changes what it only passes through; what was not to be repainted stays as it came.
        kept = await stored_source(self._transport, entry, request) if request.mask_blob else None
        data = await self._stage.submit(latents, request.output, metadata=self._metadata(request), kept=kept)
        timings = watch.stop("decode")
        context.image_s = handoff.image_s(timings)
        info = self._info(request, timings)
        return Finish(types_pb2.StoredImage(info=info, data=data).SerializeToString())

    async def show_previews(self, *, idle: Callable[[], bool]) -> None:
        """Turns offered latents into Preview events for as long as it is not cancelled.

        Args:
            idle: whether there is nothing better to do.
        """
        while True:
            if not (idle() and await self._show_one()):
                await asyncio.sleep(LOOK_AGAIN_S)

    async def _show_one(self) -> bool:
        """Whether a preview was taken."""
        task = None
        try:
            task = await self._transport.pop_preview()
            if task is not None:
                await self._show(task)
        except StreamFlowError as error:
            _log.debug("preview dropped", reason=str(error))
        except Exception as error:
            # It may come from a broken peer, and nothing depends on it.
            _log.error("preview dropped", error=error)
        return task is not None

    async def _show(self, task: PreviewTask) -> None:
        latents = await handoff.unpack_latents(self._transport, task.payload)
        if latents is None:
            return
        jpeg = await self._stage.preview(latents)
        height, width = (size * self._stage.card.latent_factor for size in latents.shape[1:])
        event = preview_event(task.ref.index, step=task.step, jpeg=jpeg, width=width, height=height)
        await self._transport.publish(task.ref.job_id, event)
        self.counters["previews_total"] += 1

    def _check_shape(self, entry: Entry, request: ImageRequest, latents: np.ndarray) -> None:
        expected = handoff.latent_shape(self._stage.card, width=request.width, height=request.height)
        with malformed(entry):
            if latents.shape != expected or latents.dtype != np.float32:
                raise ValueError(f"latents: got {latents.dtype} {latents.shape}; allowed: float32 {expected}")

    def _info(self, request: ImageRequest, timings: types_pb2.Timings) -> types_pb2.ImageInfo:
        return types_pb2.ImageInfo(
            index=request.index,
            seed=request.seed,
            format=format_to_pb(request.output.format),
            width=request.width,
            height=request.height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            sampler=request.sampler,
            model=request.model,
            model_revision=self._stage.card.revision,
            decoder=decoder_to_pb(request.output.decoder),
            timings=timings,
        )

    def _metadata(self, request: ImageRequest) -> dict[str, object]:
        """What a file says of its making: enough to make it again, and nothing of the prompt."""
        return {
            "seed": request.seed,
            "steps": request.steps,
            "guidance_scale": round(request.guidance_scale, 6),
            "sampler": request.sampler,
            "width": request.width,
            "height": request.height,
            "model": request.model,
            "model_revision": self._stage.card.revision,
            "decoder": request.output.decoder.value,
            **_guidance_metadata(request.guidance),
            **({"strength": round(request.strength, 6)} if request.init_image_blob else {}),
        }


def _guidance_metadata(guidance: Guidance) -> dict[str, object]:
    """What is not as usual, by the names of the options."""
    said, usual = (
        {
            "guidance_interval": (round(one.start_sigma, 6), round(one.end_sigma, 6)),
            "guidance_mode": one.mode.value,
            "residual_strength": round(one.residual, 6),
        }
        for one in (guidance, Guidance())
    )
    return {name: value for name, value in said.items() if value != usual[name]}
