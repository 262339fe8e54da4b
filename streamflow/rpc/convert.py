"""Between messages and the dataclasses of `streamflow.types`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from streamflow.errors import InvalidRequestError
from streamflow.flow.guidance import Guidance, GuidanceMode
from streamflow.types import (
    AdapterUse,
    DecoderKind,
    Failure,
    ImageFormat,
    JobState,
    ModelCard,
    OutputSpec,
    SlotView,
    Variant,
    WorkerInfo,
    adapter_uses,
)
from streamflow.v1 import gateway_pb2, types_pb2

if TYPE_CHECKING:
    from streamflow.v1 import denoiser_pb2

DEFAULT_QUALITY = 90

Value = TypeVar("Value")
Kind = TypeVar("Kind")

_FORMATS: Mapping[ImageFormat, types_pb2.ImageFormat] = {
    ImageFormat.PNG: types_pb2.IMAGE_FORMAT_PNG,
    ImageFormat.JPEG: types_pb2.IMAGE_FORMAT_JPEG,
    ImageFormat.WEBP: types_pb2.IMAGE_FORMAT_WEBP,
    ImageFormat.RAW: types_pb2.IMAGE_FORMAT_RAW,
}
_DECODERS: Mapping[DecoderKind, types_pb2.DecoderKind] = {
    DecoderKind.TINY: types_pb2.DECODER_KIND_TINY,
    DecoderKind.FULL: types_pb2.DECODER_KIND_FULL,
}
_STATES: Mapping[JobState, types_pb2.JobState] = {
    JobState.QUEUED: types_pb2.JOB_STATE_QUEUED,
    JobState.RUNNING: types_pb2.JOB_STATE_RUNNING,
    JobState.IMAGES: types_pb2.JOB_STATE_IMAGES,
    JobState.ERROR: types_pb2.JOB_STATE_ERROR,
    JobState.CANCELLED: types_pb2.JOB_STATE_CANCELLED,
    JobState.DEADLINE: types_pb2.JOB_STATE_DEADLINE,
}
_MODES: Mapping[GuidanceMode, types_pb2.GuidanceMode] = {
    GuidanceMode.FULL: types_pb2.GUIDANCE_MODE_FULL,
    GuidanceMode.SELF_NEGATIVE: types_pb2.GUIDANCE_MODE_SELF_NEGATIVE,
    GuidanceMode.ONETIME_NEGATIVE: types_pb2.GUIDANCE_MODE_ONETIME_NEGATIVE,
}
_FORMATS_BACK = {value: key for key, value in _FORMATS.items()}
_DECODERS_BACK = {value: key for key, value in _DECODERS.items()}
_STATES_BACK = {value: key for key, value in _STATES.items()}
_MODES_BACK = {value: key for key, value in _MODES.items()}


def format_to_pb(kind: ImageFormat) -> types_pb2.ImageFormat:
    return _FORMATS[kind]


def format_from_pb(value: types_pb2.ImageFormat) -> ImageFormat:
    """PNG for the unspecified value; ValueError for one that does not exist."""
    return _known(value, _FORMATS_BACK, ImageFormat.PNG, "image format")


def decoder_to_pb(kind: DecoderKind) -> types_pb2.DecoderKind:
    return _DECODERS[kind]


def decoder_from_pb(value: types_pb2.DecoderKind, default: DecoderKind = DecoderKind.TINY) -> DecoderKind:
    """`default` for the unspecified value; ValueError for one that does not exist."""
    return _known(value, _DECODERS_BACK, default, "decoder kind")


def state_to_pb(state: JobState) -> types_pb2.JobState:
    return _STATES[state]


def state_from_pb(value: types_pb2.JobState) -> JobState:
    """ValueError for a value that is no state."""
    if value not in _STATES_BACK:
        raise ValueError(f"job state {value} is not known")
    return _STATES_BACK[value]


def failure_to_pb(failure: Failure) -> types_pb2.Failure:
    return types_pb2.Failure(code=failure.code, message=failure.message, stage=failure.stage)


def failure_from_pb(failure: types_pb2.Failure) -> Failure:
    return Failure(failure.code, failure.message, failure.stage)


def output_to_pb(output: OutputSpec) -> types_pb2.OutputOptions:
    return types_pb2.OutputOptions(
        format=format_to_pb(output.format),
        quality=output.quality,
        decoder=decoder_to_pb(output.decoder),
        embed_metadata=output.embed_metadata,
    )


def output_from_pb(output: types_pb2.OutputOptions, *, decoder: DecoderKind = DecoderKind.TINY) -> OutputSpec:
    """Fills in defaults; `decoder` is the model's."""
    return OutputSpec(
        format=format_from_pb(output.format),
        quality=output.quality or DEFAULT_QUALITY,
        decoder=decoder_from_pb(output.decoder, decoder),
        embed_metadata=output.embed_metadata,
    )


def guidance_mode_to_pb(mode: GuidanceMode) -> types_pb2.GuidanceMode:
    return _MODES[mode]


def guidance_from_pb(
    scale: float,
    options: types_pb2.GuidanceOptions,
    *,
    card: ModelCard,
    true_cfg_scale: float | None = None,
) -> Guidance:
    """Fills in defaults.

    Args:
        scale: the request's guidance_scale: of the guidance, or for the network where the model is fed it.
        true_cfg_scale: of the guidance of a model that is fed the other one; None = none.

    Raises:
        InvalidRequestError: a mode that does not exist.
    """
    if options.mode not in types_pb2.GuidanceMode.values():
        raise InvalidRequestError("guidance.mode", options.mode, "one of " + ", ".join(types_pb2.GuidanceMode.keys()))
    scale, embedded = card.guidance_scales(scale, true_cfg_scale)
    return Guidance(
        scale=scale,
        embedded=embedded,
        start_sigma=options.start_sigma if options.HasField("start_sigma") else 1.0,
        end_sigma=options.end_sigma,
        mode=_known(options.mode, _MODES_BACK, GuidanceMode.FULL, "guidance mode"),
        residual=options.residual_strength if options.HasField("residual_strength") else 1.0,
    )


def worker_to_pb(
    worker: WorkerInfo, *, backlog: int | None = None, now_s: float | None = None
) -> types_pb2.StageStatus:
    """What `status` shows of a replica.

    Args:
        backlog: in place of what the worker said.
        now_s: seconds since 1970; the uptime counts up to it.
    """
    now_s = time.time() if now_s is None else now_s
    return types_pb2.StageStatus(
        stage=worker.stage.service,
        worker_id=worker.worker_id,
        model=worker.model,
        model_revision=worker.model_revision,
        backend=worker.backend,
        device=worker.device,
        slots=worker.slots,
        slots_in_use=worker.slots_in_use,
        backlog=worker.backlog if backlog is None else backlog,
        draining=worker.draining,
        uptime_s=max(0.0, now_s - worker.started_at_s) if worker.started_at_s else 0.0,
        counters=worker.counters,
        call_ms=worker.call_ms,
        row_ms=worker.row_ms,
        row_counts=worker.row_counts,
        work=map(_slot_to_pb, worker.work),
        image_ms=worker.image_ms,
    )


def _slot_to_pb(slot: SlotView) -> types_pb2.SlotWork:
    job, _, index = slot.image.rpartition(":")
    return types_pb2.SlotWork(
        # A tenant's jobs have its name in front.
        request_id=job.rpartition("~")[2],
        index=int(index or 0),
        step=slot.step,
        steps=slot.steps,
        timestep=slot.timestep,
        sampler=slot.sampler,
    )


def card_to_pb(card: ModelCard, *, live: bool) -> gateway_pb2.Model:
    return gateway_pb2.Model(
        name=card.name,
        revision=card.revision,
        family=card.family,
        default_width=card.default_width,
        default_height=card.default_height,
        size_multiple=card.size_multiple,
        max_width=card.max_width,
        max_height=card.max_height,
        default_steps=card.default_steps,
        max_steps=card.max_steps,
        default_guidance_scale=card.default_guidance_scale,
        default_sampler=card.default_sampler,
        samplers=card.samplers,
        decoders=[decoder_to_pb(kind) for kind in card.decoders],
        max_prompt_tokens=card.max_prompt_tokens,
        live=live,
        class_labels=card.class_labels,
        embedded_guidance=card.embedded_guidance,
        adapters=card.adapters,
        controls=card.controls,
    )


def true_cfg_scale(
    request: types_pb2.GenerateRequest | denoiser_pb2.DenoiseRequest | denoiser_pb2.ChangeRequest,
) -> float | None:
    return request.true_cfg_scale if request.HasField("true_cfg_scale") else None


def texts_from_pb(request: types_pb2.GenerateRequest) -> list[str]:
    """What each of its num_images pictures shows: the prompts, or the labels as numbers."""
    return [*request.prompts] or [str(label) for label in request.class_labels]


def adapters_from_pb(adapters: Iterable[types_pb2.Adapter]) -> tuple[AdapterUse, ...]:
    return adapter_uses((one.name, one.weight if one.HasField("weight") else 1.0) for one in adapters)


def variant_from_pb(request: types_pb2.GenerateRequest | denoiser_pb2.DenoiseRequest) -> Variant:
    return Variant(adapters_from_pb(request.adapters), request.control.name)


def control_scale_from_pb(control: types_pb2.Control) -> float:
    return control.scale if control.HasField("scale") else 1.0


def progress_event(index: int, *, step: int, steps: int) -> bytes:
    """What a denoiser publishes after a step: a GenerateEvent; the gateway adds the request's id."""
    event = gateway_pb2.GenerateEvent(progress=gateway_pb2.Progress(index=index, step=step, steps=steps))
    return event.SerializeToString()


def preview_event(index: int, *, step: int, jpeg: bytes, width: int, height: int) -> bytes:
    """What a decoder publishes of an unfinished image: a GenerateEvent; the gateway adds the request's id."""
    preview = gateway_pb2.Preview(index=index, step=step, data=jpeg, width=width, height=height)
    return gateway_pb2.GenerateEvent(preview=preview).SerializeToString()


def _known(value: Value, kinds: Mapping[Value, Kind], default: Kind, what: str) -> Kind:
    if not value:
        return default
    if value not in kinds:
        raise ValueError(f"{what} {value} is not known")
    return kinds[value]
