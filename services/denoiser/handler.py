"""What an entry of the denoise stream becomes: latents, and an entry for the decoder."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from streamflow.errors import BusyError, UnavailableError
from streamflow.host import handoff
from streamflow.host.handoff import Stopwatch, malformed
from streamflow.host.latest import Latest, passed_on
from streamflow.host.request import ImageRequest, read_request
from streamflow.host.sources import stored_control
from streamflow.rpc.convert import progress_event
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.runner import EngineEndedError, SuspendedError
from streamflow.telemetry import get_logger
from streamflow.transport import codec
from streamflow.transport.base import Entry, PreviewTask, Transport
from streamflow.transport.handling import Advance, EntryContext, Outcome
from streamflow.types import DenoiseJob, SlotState, Stage, Tensors

PROGRESS_INTERVAL_S = 0.1
PREVIEW_INTERVAL_S = 0.5
# A preview that no decoder took by then is of no use to anybody.
PREVIEW_KEEP_S = 5.0

_log = get_logger(__name__)


class _GoneError(Exception):
    """A tensor that the entry refers to is no longer stored."""


class _Progress(NamedTuple):
    step: int
    steps: int


class _Preview(NamedTuple):
    step: int
    latents: np.ndarray


class DenoiseHandler:
    """Denoises one image in the running batch.

    Args:
        stage: entered by the caller.
        transport: where tensors are fetched, and progress and previews go.
    """

    def __init__(self, stage: DenoiserStage, transport: Transport) -> None:
        self._stage, self._transport = stage, transport
        self.counters = Counter({"sent_back_total": 0, "handed_over_total": 0})

    def suspend(self) -> None:
        """What is under way goes to other denoisers, which continue it."""
        self._stage.suspend()

    async def __call__(self, context: EntryContext) -> Outcome:
        """Advances the image to the decoder, back to the encoder when a tensor is gone, or to another denoiser.

        Raises:
            InvalidRequestError: the job cannot be run, such as a strength that leaves no step.
            GenerationError: the entry cannot be read, or the network failed.
        """
        entry = context.entry
        with malformed(entry):
            watch = Stopwatch(entry)
        spec = await self._transport.spec(entry.ref.job_id)
        request = read_request(spec, entry.ref.index, self._stage.card)
        try:
            job = await self._job(entry, request)
        except _GoneError:
            self.counters["sent_back_total"] += 1
            return handoff.send_back(entry, watch.stop("denoise"))
        try:
            latents = await self._denoise(context, job)
        except EngineEndedError as error:
            # Not "unavailable", which would cost no attempt: it may be this image that ends engines.
            raise RuntimeError(f"{error}, while it made {entry.ref}") from error
        except SuspendedError as suspended:
            return await self._hand_over(entry, suspended.state, watch)
        payload = await handoff.pack_latents(self._transport, latents, keep_s=handoff.keep_s(entry))
        payload |= handoff.carried(entry, watch.stop("denoise"))
        return Advance(Stage.DECODE, payload)

    async def _hand_over(self, entry: Entry, state: SlotState, watch: Stopwatch) -> Advance:
        """An entry like this one, with which another denoiser goes on where this one stopped."""
        self.counters["handed_over_total"] += 1
        payload = handoff.without_state(entry.payload) | handoff.carried(entry, watch.stop("denoise"))
        payload |= await handoff.pack_state(self._transport, state, keep_s=handoff.keep_s(entry))
        return Advance(Stage.DENOISE, payload)

    async def _job(self, entry: Entry, request: ImageRequest) -> DenoiseJob:
        init = await self._tensor(entry, handoff.INIT) if request.init_image_blob else None
        mask = await self._tensor(entry, handoff.MASK) if request.mask_blob else None
        return DenoiseJob(
            conditioning={role: await self._conditioning(entry, handoff.text_field(role)) for role in request.texts},
            steps=request.steps,
            guidance=request.guidance,
            sampler=request.sampler,
            seed=request.seed,
            height=request.height,
            width=request.width,
            init_latents=init,
            strength=request.strength,
            mask=mask,
            preview_interval_steps=request.preview_interval_steps,
            resume=await self._state(entry, request),
            variant=request.variant,
            control_image=await stored_control(self._transport, entry, request),
            control_scale=request.control_scale,
        )

    async def _conditioning(self, entry: Entry, name: str) -> Tensors:
        data = await self._transport.get_cached(_needed(entry, name), keep_s=handoff.keep_s(entry))
        if data is None:
            raise _GoneError(name)
        with malformed(entry):
            return codec.decode_tensors(data, field=name, finite=True)

    async def _state(self, entry: Entry, request: ImageRequest) -> SlotState | None:
        shape = handoff.latent_shape(self._stage.card, width=request.width, height=request.height)
        with malformed(entry):
            return await handoff.unpack_state(self._transport, entry.payload, shape=shape)

    async def _tensor(self, entry: Entry, name: str) -> np.ndarray:
        data = await self._transport.get_blob(_needed(entry, name))
        if data is None:
            raise _GoneError(name)
        with malformed(entry):
            return codec.decode(data, field=name, finite=True)

    async def _denoise(self, context: EntryContext, job: DenoiseJob) -> np.ndarray:
        entry = context.entry
        progress: Latest[_Progress] = Latest(interval_s=PROGRESS_INTERVAL_S)
        previews: Latest[_Preview] = Latest(interval_s=PREVIEW_INTERVAL_S)

        def on_progress(step: int, steps: int) -> None:
            context.progress()
            progress.put(_Progress(step, steps))

        def on_preview(step: int, latents: np.ndarray) -> None:
            previews.put(_Preview(step, latents))
            context.note("preview", step=step)

        async with passed_on((progress, self._publish(entry, progress)), (previews, self._offer(entry, previews))):
            # Direct calls may hold every slot; waiting for one is no fault of the image's.
            return await self._stage.denoise(
                job,
                label=str(entry.ref),
                on_progress=on_progress,
                on_preview=on_preview,
                on_wait=context.progress,
            )

    async def _publish(self, entry: Entry, progress: Latest[_Progress]) -> None:
        async for step, steps in progress:
            try:
                await self._transport.publish(entry.ref.job_id, progress_event(entry.ref.index, step=step, steps=steps))
            except (UnavailableError, BusyError) as error:
                _log.debug("progress not published", image=str(entry.ref), reason=str(error))

    async def _offer(self, entry: Entry, previews: Latest[_Preview]) -> None:
        async for step, latents in previews:
            try:
                payload = await handoff.pack_latents(self._transport, latents, keep_s=PREVIEW_KEEP_S, admitted=False)
                await self._transport.push_preview(PreviewTask(entry.ref, step, payload))
            except (UnavailableError, BusyError) as error:
                _log.debug("preview not offered", image=str(entry.ref), reason=str(error))


def _needed(entry: Entry, name: str) -> str:
    with malformed(entry):
        found = handoff.reference(entry.payload, name)
        if found is None:
            raise ValueError(f"{name} is missing")
    return found
