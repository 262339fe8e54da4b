"""A small checkpoint's three stages behind one in-memory transport, and the jobs that a gateway would admit."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest_asyncio

from services.decoder.handler import DecodeHandler
from services.denoiser.handler import DenoiseHandler
from services.encoder.handler import EncodeHandler
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.encoder import EncoderStage
from streamflow.transport.base import Entry, ImageRef, NewJob, Payload
from streamflow.transport.handling import Advance, EntryContext, Finish, Handler, Outcome
from streamflow.transport.memory import MemoryTransport
from streamflow.types import ModelCard, Stage
from streamflow.v1 import types_pb2

WORKER = "the-test"


@dataclass(slots=True)
class Rig:
    """One replica of each stage, driven entry by entry."""

    transport: MemoryTransport
    card: ModelCard
    handlers: dict[Stage, Handler]

    async def admit(self, spec: types_pb2.JobSpec | bytes, *, name: str = "job") -> ImageRef:
        """Admits one image."""
        data = spec if isinstance(spec, bytes) else spec.SerializeToString()
        await self.transport.admit(NewJob(name, hashlib.sha256(data).hexdigest(), data, num_images=1))
        return ImageRef(name, 0)

    def spec(self, **fields: object) -> types_pb2.JobSpec:
        """What a gateway writes down; `fields` are of the request."""
        card = self.card
        defaults = {
            "prompts": ["a red"],
            "steps": 2,
            "guidance_scale": 1.0,
            "sampler": "euler",
            "seed": 7,
            "width": card.default_width,
            "height": card.default_height,
            "model": card.name,
        }
        request = types_pb2.GenerateRequest(**defaults | fields)  # type: ignore[arg-type]
        return types_pb2.JobSpec(request=request, model_revision=card.revision)

    async def next(self, stage: Stage) -> Entry:
        [entry] = await self.transport.read(stage, WORKER, 1)
        return entry

    async def handle(self, entry: Entry, *, progress_timeout_s: float = 60.0) -> Outcome:
        """What the stage makes of an entry, not yet stored."""
        context = EntryContext(entry, progress_timeout_s=progress_timeout_s)
        return await context.run(self.handlers[entry.stage])

    async def step(self, stage: Stage) -> Outcome:
        """One entry, worked on and stored."""
        entry = await self.next(stage)
        outcome = await self.handle(entry)
        match outcome:
            case Advance(to, payload, warnings):
                assert await self.transport.advance(entry, to, payload, warnings=warnings)
            case Finish(result):
                assert await self.transport.finish(entry, result)
        return outcome

    async def forge(self, stage: Stage, payload: Payload, spec: types_pb2.JobSpec | None = None) -> Entry:
        """An entry of a stage that nobody made in earnest."""
        await self.admit(spec or self.spec())
        entry = await self.next(Stage.ENCODE)
        assert await self.transport.advance(entry, stage, payload)
        return await self.next(stage)


@dataclass(frozen=True, slots=True)
class Stages:
    encoder: EncoderStage
    denoiser: DenoiserStage
    decoder: DecoderStage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stages(sd_checkpoint: Path) -> AsyncIterator[Stages]:
    """The three stages, running."""
    async with (
        EncoderStage.load(sd_checkpoint, device="cpu") as encoder,
        DenoiserStage.load(sd_checkpoint, device="cpu", slots=4) as denoiser,
        DecoderStage.load(sd_checkpoint, device="cpu") as decoder,
    ):
        yield Stages(encoder, denoiser, decoder)


@pytest_asyncio.fixture(loop_scope="module")
async def rig(stages: Stages) -> Rig:
    """The stages behind a transport of this test's own."""
    transport = MemoryTransport()
    handlers: dict[Stage, Handler] = {
        Stage.ENCODE: EncodeHandler(stages.encoder, transport, cache_s=60.0),
        Stage.DENOISE: DenoiseHandler(stages.denoiser, transport),
        Stage.DECODE: DecodeHandler(stages.decoder, transport),
    }
    return Rig(transport, stages.encoder.card, handlers)
