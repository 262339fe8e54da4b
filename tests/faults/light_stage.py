"""A stage of milliseconds: `python -m tests.faults.light_stage encoder|denoiser|decoder`.

Everything but the networks is the product's: settings, worker loop, transport, gRPC server, drain. What the networks
would compute is a hash of the request, so that every picture is known beforehand and importing torch costs no kill.

STREAMFLOW_FAULT names a file that may order a process to end: see `Fault`. The points are in `FaultyTransport` and
`Handler`.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from PIL import Image

from streamflow.config import StageSettings
from streamflow.families import describe
from streamflow.families.source import checkpoint_from
from streamflow.flow.programs import Role
from streamflow.host.control import ControlServicer, StageControl
from streamflow.host.process import StageService, serve
from streamflow.host.request import ImageRequest, read_request
from streamflow.rpc.convert import format_to_pb, progress_event
from streamflow.rpc.server import Service
from streamflow.telemetry import configure_logging
from streamflow.transport.base import Transport
from streamflow.transport.handling import Advance, EntryContext, Finish, Outcome
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import ImageFormat, ModelCard, Stage
from streamflow.v1 import (
    decoder_pb2,
    decoder_pb2_grpc,
    denoiser_pb2,
    denoiser_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    types_pb2,
)

STEP_S = 0.02
"""What one step of the denoiser takes, unless STREAMFLOW_STEP_S says otherwise."""

POISON = "poison"
"""A prompt with this word ends the denoiser; with `CURSE` its step raises; with `HANG` it makes no progress."""
CURSE, HANG = "curse", "hang"
ONCE = "once"
"""With this word besides it hangs in its first attempt only."""

_SERVICES: dict[Stage, tuple[str, Any, Any]] = {
    Stage.ENCODE: (
        encoder_pb2.DESCRIPTOR.services_by_name["TextEncoder"].full_name,
        encoder_pb2_grpc.add_TextEncoderServicer_to_server,
        encoder_pb2_grpc.TextEncoderServicer,
    ),
    Stage.DENOISE: (
        denoiser_pb2.DESCRIPTOR.services_by_name["Denoiser"].full_name,
        denoiser_pb2_grpc.add_DenoiserServicer_to_server,
        denoiser_pb2_grpc.DenoiserServicer,
    ),
    Stage.DECODE: (
        decoder_pb2.DESCRIPTOR.services_by_name["Decoder"].full_name,
        decoder_pb2_grpc.add_DecoderServicer_to_server,
        decoder_pb2_grpc.DecoderServicer,
    ),
}


def picture(prompt: str, seed: int, steps: int, *, width: int, height: int) -> bytes:
    """The PNG that a request gives: noise that depends on all of these."""
    digest = sha256(f"{prompt}|{seed}|{steps}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


class LightStage:
    """What a process needs of the stage that it hosts, without networks."""

    backend = "light"
    cost = None
    row_counts: tuple[int, ...] = ()
    work = ()

    def __init__(self, card: ModelCard, slots: int) -> None:
        self.card, self.slots = card, slots
        self.counters: dict[str, int] = {}

    def warm_up(self) -> None:
        pass

    async def watch(self, *, hung_after_s: float) -> None:
        await asyncio.Event().wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass


class Fault:
    """Ends this process by SIGKILL where a file says so: `<service>:<point>:<n>`, the nth time that it is reached.

    The file is taken away first: that is how others know, and the next process goes past the point.
    """

    def __init__(self, service: str, order: Path) -> None:
        self._service, self._order = service, order
        self._reached: Counter[str] = Counter()

    def reach(self, point: str) -> None:
        try:
            service, wanted, number = self._order.read_text().split(":")
        except FileNotFoundError:
            return
        if (service, wanted) == (self._service, point):
            self._reached[point] += 1
            if self._reached[point] == int(number):
                self._order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)


class FaultyTransport:
    """The real transport; before and after each of these calls there is a point, such as `before-advance`."""

    WATCHED = ("read", "advance", "finish", "heartbeat", "hand_back", "register")

    def __init__(self, transport: Transport, fault: Fault) -> None:
        self._transport, self._fault = transport, fault

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._transport, name)
        if name not in self.WATCHED:
            return method

        async def watched(*args: Any, **kwargs: Any) -> Any:
            self._fault.reach(f"before-{name}")
            result = await method(*args, **kwargs)
            # Reading nothing is no event.
            if name != "read" or result:
                self._fault.reach(f"after-{name}")
            return result

        return watched


class Handler:
    """Encodes, denoises or decodes by hashing; its points are `working` (in the middle of an entry)."""

    def __init__(self, stage: Stage, card: ModelCard, transport: Transport, fault: Fault, *, step_s: float) -> None:
        self._stage, self._card, self._transport, self._fault = stage, card, transport, fault
        self._step_s = step_s
        self._leaving = False
        self.counters: Counter[str] = Counter()

    def suspend(self) -> None:
        self._leaving = True

    async def __call__(self, context: EntryContext) -> Outcome:
        spec = await self._transport.spec(context.entry.ref.job_id)
        request = read_request(spec, context.entry.ref.index, self._card)
        match self._stage:
            case Stage.ENCODE:
                self._fault.reach("working")
                return Advance(Stage.DENOISE, {"text": request.texts[Role.TARGET].encode()})
            case Stage.DENOISE:
                return await self._denoise(context, request)
            case Stage.DECODE:
                self._fault.reach("working")
                return Finish(self._decode(context, request))

    async def _denoise(self, context: EntryContext, request: ImageRequest) -> Outcome:
        prompt, entry = request.texts[Role.TARGET], context.entry
        for step in range(int(entry.payload.get("done", 0)), request.steps):
            if self._leaving:
                return Advance(Stage.DENOISE, {**entry.payload, "done": str(step).encode()})
            if step == request.steps // 2:
                self._fault.reach("working")
                if POISON in prompt:
                    os.kill(os.getpid(), signal.SIGKILL)
                if CURSE in prompt:
                    raise ArithmeticError("cursed")
                if HANG in prompt and (ONCE not in prompt or entry.attempt == 1):
                    await asyncio.Event().wait()
            await asyncio.sleep(self._step_s)
            self.counters["steps_total"] += 1
            context.progress()
        await self._transport.publish(entry.ref.job_id, progress_event(entry.ref.index, step=1, steps=1))
        return Advance(Stage.DECODE, {"text": entry.payload["text"]})

    def _decode(self, context: EntryContext, request: ImageRequest) -> bytes:
        prompt = context.entry.payload["text"].decode()
        data = picture(prompt, request.seed, request.steps, width=request.width, height=request.height)
        info = types_pb2.ImageInfo(
            index=request.index,
            seed=request.seed,
            format=format_to_pb(ImageFormat.PNG),
            width=request.width,
            height=request.height,
            steps=request.steps,
            sampler=request.sampler,
        )
        return types_pb2.StoredImage(info=info, data=data).SerializeToString()


def main(name: str, environment: Mapping[str, str]) -> None:
    settings = StageSettings()
    configure_logging(level=settings.log_level, log_format=settings.log_format, service=name)
    stage = next(stage for stage in Stage if stage.service == name)
    card = describe(checkpoint_from(settings))
    fault = Fault(name, Path(environment.get("STREAMFLOW_FAULT", "nothing ordered")))
    full_name, register, base = _SERVICES[stage]

    def handler(hosted: LightStage, transport: Transport, settings: StageSettings) -> Handler:
        return Handler(stage, card, transport, fault, step_s=float(environment.get("STREAMFLOW_STEP_S", STEP_S)))

    def servicer(hosted: LightStage, control: StageControl) -> Service:
        return Service(full_name, register, type(name, (ControlServicer, base), {})(control))

    light = LightStage(card, settings.slots or 8)
    service = StageService(stage, load=lambda _: light, handler=handler, servicer=servicer, suspend=Handler.suspend)
    transport = cast("Transport", FaultyTransport(RedisTransport.of(settings, revision=card.revision), fault))
    asyncio.run(serve(service, light, settings, transport=transport, device="none"))


if __name__ == "__main__":
    main(sys.argv[1], os.environ)
