"""What happens to a request, as its client sees it."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from streamflow.rpc.convert import decoder_from_pb, failure_from_pb, format_from_pb, state_from_pb
from streamflow.types import DecoderKind, Failure, ImageFormat, JobState
from streamflow.v1 import gateway_pb2, types_pb2


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds that one image spent in each part of its way."""

    waiting_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of a finished image; `seed` makes this very image again, alone."""

    index: int
    seed: int
    format: ImageFormat
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    model: str
    model_revision: str
    decoder: DecoderKind
    timings: Timings

    @classmethod
    def from_pb(cls, info: types_pb2.ImageInfo) -> ImageInfo:
        timings = info.timings
        return cls(
            index=info.index,
            seed=info.seed,
            format=format_from_pb(info.format),
            width=info.width,
            height=info.height,
            steps=info.steps,
            guidance_scale=info.guidance_scale,
            sampler=info.sampler,
            model=info.model,
            model_revision=info.model_revision,
            decoder=decoder_from_pb(info.decoder),
            timings=Timings(timings.waiting_ms, timings.encode_ms, timings.denoise_ms, timings.decode_ms),
        )


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first event: the request as the server understood it; `seed` is that of image 0.

    `attached` says that an earlier request with this id was found and is watched in its place. `estimate_s` is how long
    the request was expected to take when it was admitted; None where nothing has been measured yet.
    """

    request_id: str
    seed: int
    num_images: int
    model: str
    model_revision: str
    attached: bool
    steps: int
    guidance_scale: float
    sampler: str
    width: int
    height: int
    estimate_s: float | None = None
    decoder: DecoderKind | None = None


@dataclass(frozen=True, slots=True)
class Queued:
    """Images ahead of the request's first waiting one, and seconds until its last is finished, where that is known."""

    position: int
    estimate_s: float | None


@dataclass(frozen=True, slots=True)
class Progress:
    """One image made a step. Lossy: a slow reader misses some."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What an unfinished image will look like; `data` is a JPEG. Lossy."""

    index: int
    step: int
    width: int
    height: int
    data: bytes = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """Decoded anew at each access."""
        return Image.open(io.BytesIO(self.data)).convert("RGB")


@dataclass(frozen=True, slots=True)
class ImageReady:
    """A finished image; `data` is the file, in `info.format`."""

    info: ImageInfo
    data: bytes = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """Decoded anew at each access."""
        return decode_image(self.info, self.data)


@dataclass(frozen=True, slots=True)
class RequestWarning:
    """Something that did not stop the request, such as a prompt that was cut."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Done:
    """The last event; `failure` is set unless `state` is IMAGES."""

    state: JobState
    failure: Failure | None
    total_ms: float


Event = Accepted | Queued | Progress | Preview | ImageReady | RequestWarning | Done


def decode_image(info: ImageInfo, data: bytes) -> Image.Image:
    """The picture in a finished image's file, RGB."""
    if info.format is ImageFormat.RAW:
        return Image.frombytes("RGB", (info.width, info.height), data)
    return Image.open(io.BytesIO(data)).convert("RGB")


def small_event(message: gateway_pb2.GenerateEvent) -> Event | None:
    """Any event but an image, which may come in parts; None for one that this version does not know."""
    match message.WhichOneof("event"):
        case "accepted":
            return _accepted(message.request_id, message.accepted)
        case "queued":
            queued = message.queued
            return Queued(queued.position, queued.estimate_s if queued.HasField("estimate_s") else None)
        case "progress":
            return Progress(message.progress.index, message.progress.step, message.progress.steps)
        case "preview":
            preview = message.preview
            return Preview(preview.index, preview.step, preview.width, preview.height, preview.data)
        case "warning":
            return _warning(message.warning)
        case "done":
            done = message.done
            failure = failure_from_pb(done.failure) if done.HasField("failure") else None
            return Done(state_from_pb(done.state), failure, done.total_ms)
        case _:
            return None


def _accepted(request_id: str, accepted: gateway_pb2.Accepted) -> Accepted:
    return Accepted(
        request_id=request_id,
        seed=accepted.seed,
        num_images=accepted.num_images,
        model=accepted.model,
        model_revision=accepted.model_revision,
        attached=accepted.attached,
        steps=accepted.steps,
        guidance_scale=accepted.guidance_scale,
        sampler=accepted.sampler,
        width=accepted.width,
        height=accepted.height,
        estimate_s=accepted.estimate_s if accepted.HasField("estimate_s") else None,
        decoder=decoder_from_pb(accepted.decoder) if accepted.decoder else None,
    )


def _warning(warning: Any) -> RequestWarning:
    # Any: the type checker takes the stub's Warning for the builtin of that name.
    return RequestWarning(warning.code, warning.message)
