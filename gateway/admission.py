"""Whether a request can be taken, and what its unset fields become: pure functions, no I/O.

Every refusal is an InvalidRequestError that names the field, the value and what is allowed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from gateway.budget import check_budget
from streamflow.config import GatewaySettings
from streamflow.errors import DeadlineError, InvalidRequestError
from streamflow.flow.programs import Program
from streamflow.flow.samplers import sampler_steps
from streamflow.rpc import convert
from streamflow.types import NO_QUOTA, ModelCard, Quota
from streamflow.v1 import types_pb2
from streamflow.validation import (
    check_control_image,
    check_prompt,
    check_request_id,
    check_sampling,
    check_size,
    check_subjects,
    check_true_cfg_scale,
    check_variant,
    texts_for,
)

DEFAULT_STRENGTH = 0.8

_PRIORITIES = {
    types_pb2.PRIORITY_UNSPECIFIED: 0,
    types_pb2.PRIORITY_LOW: -1,
    types_pb2.PRIORITY_NORMAL: 0,
    types_pb2.PRIORITY_HIGH: 1,
}
# Room for an image's entry, events and embeddings beside its pixels.
_OVERHEAD_BYTES = 256 * 1024


def fill_in(
    request: types_pb2.GenerateRequest,
    *,
    card: ModelCard,
    settings: GatewaySettings,
    request_id: str,
    seed: int,
    quota: Quota = NO_QUOTA,
) -> types_pb2.GenerateRequest:
    """The request with every default filled in, and without its image bytes.

    Args:
        request_id, seed: for a request that has none.
        quota: the tenant's own.

    Raises:
        InvalidRequestError: the request cannot be served.
    """
    check(request, card=card, settings=settings, quota=quota)
    filled = types_pb2.GenerateRequest()
    filled.CopyFrom(request)
    filled.DiscardUnknownFields()
    filled.ClearField("init_image")
    filled.ClearField("mask_image")
    filled.control.ClearField("image")
    filled.request_id = request.request_id or request_id
    filled.model = card.name
    filled.num_images = request.num_images or 1
    filled.width = request.width or card.default_width
    filled.height = request.height or card.default_height
    filled.sampler = request.sampler.strip() or card.default_sampler
    filled.priority = request.priority or types_pb2.PRIORITY_NORMAL
    _default(filled, "steps", sampler_steps(filled.sampler, card.default_steps))
    _default(filled, "guidance_scale", card.default_guidance_scale)
    _default(filled, "seed", seed)
    if request.init_image:
        _default(filled, "strength", DEFAULT_STRENGTH)
    filled.output.CopyFrom(convert.output_to_pb(convert.output_from_pb(request.output, decoder=card.default_decoder)))
    return filled


def check(
    request: types_pb2.GenerateRequest, *, card: ModelCard, settings: GatewaySettings, quota: Quota = NO_QUOTA
) -> None:
    """Raises InvalidRequestError for the first field that cannot be used."""
    _check_identity(request, card)
    _check_prompts(request, card, settings)
    _check_counts(request, card, settings)
    _check_rate(request, settings, quota)
    check_true_cfg_scale(card, convert.true_cfg_scale(request), request.negative_prompt)
    _check_size(request, card, settings)
    _check_images(request, settings)
    _check_variant(request, card)
    check_budget(request, card, settings)
    _check_sampling(request, card)
    _check_output(request, card)


def digest(request: types_pb2.GenerateRequest) -> str:
    """SHA-256 of the request as the client gave it: sent again it is the same, even where the server chose the seed."""
    return hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()


def timeout_s(remaining_s: float | None, settings: GatewaySettings) -> float:
    """Seconds from now to the job's deadline: what is left of the call, within the deployment's bounds."""
    if remaining_s is None:
        return settings.default_timeout_s
    if not remaining_s > 0:
        raise DeadlineError("the call's deadline had passed before it was admitted; allow it more time")
    return min(remaining_s, settings.max_timeout_s)


def priority(request: types_pb2.GenerateRequest) -> int:
    """-1 low, 0 normal, 1 high."""
    return _PRIORITIES[request.priority]


def num_images(request: types_pb2.GenerateRequest) -> int:
    """Images over all prompts."""
    return len(convert.texts_from_pb(request)) * (request.num_images or 1)


def work(request: types_pb2.GenerateRequest, card: ModelCard) -> float:
    """What each image of a request costs: network rows, where one of the default size is 1."""
    width, height = request.width or card.default_width, request.height or card.default_height
    pixels = width * height / (card.default_width * card.default_height)
    return max(_program(request, card).rows * pixels, 1e-3)


def work_if_it_runs(request: types_pb2.GenerateRequest, card: ModelCard) -> float | None:
    """None where the sampler cannot run with these values."""
    try:
        return work(request, card)
    except InvalidRequestError:
        return None


def reserved_bytes(request: types_pb2.GenerateRequest) -> int:
    """What the results of a filled-in request may take: raw pixels at most, and what belongs to them."""
    return num_images(request) * (request.width * request.height * 3 + _OVERHEAD_BYTES)


def _check_identity(request: types_pb2.GenerateRequest, card: ModelCard) -> None:
    if request.request_id:
        check_request_id(request.request_id)
    if request.model not in ("", card.name):
        raise InvalidRequestError("model", request.model, f"one of {card.name}")
    _check_enum("priority", request.priority, types_pb2.Priority.items())


def _check_prompts(request: types_pb2.GenerateRequest, card: ModelCard, settings: GatewaySettings) -> None:
    texts = {"negative_prompt": request.negative_prompt, "source_prompt": request.source_prompt}
    check_subjects(card, request.prompts, request.class_labels, most=settings.max_prompts, **texts)
    for number, prompt in enumerate(request.prompts):
        field = f"prompts[{number}]"
        check_prompt(field, prompt, max_chars=settings.max_prompt_chars)
    check_prompt("negative_prompt", request.negative_prompt, max_chars=settings.max_prompt_chars, may_be_empty=True)
    check_prompt("source_prompt", request.source_prompt, max_chars=settings.max_prompt_chars, may_be_empty=True)


def _check_counts(request: types_pb2.GenerateRequest, card: ModelCard, settings: GatewaySettings) -> None:
    if num_images(request) > settings.max_images:
        allowed = f"at most {settings.max_images} images over all prompts"
        raise InvalidRequestError("num_images", request.num_images, allowed, "send several requests")
    _check_range("preview_interval_steps", request.preview_interval_steps, 0, card.max_steps)


def _check_rate(request: types_pb2.GenerateRequest, settings: GatewaySettings, quota: Quota) -> None:
    own = quota.images_per_minute
    per_minute = settings.tenant_images_per_minute if own is None else own
    if per_minute and num_images(request) > per_minute:
        allowed = f"at most {per_minute:g} images over all prompts, which is what you may have in a minute"
        raise InvalidRequestError("num_images", request.num_images, allowed, "send several requests")


def _check_sampling(request: types_pb2.GenerateRequest, card: ModelCard) -> None:
    _check_enum("guidance.mode", request.guidance.mode, types_pb2.GuidanceMode.items())
    sampler = request.sampler.strip() or card.default_sampler
    texts_for(_program(request, card), prompt="", source_prompt=request.source_prompt, sampler=sampler)


def _program(request: types_pb2.GenerateRequest, card: ModelCard) -> Program:
    sampler = request.sampler.strip() or card.default_sampler
    scale = request.guidance_scale if request.HasField("guidance_scale") else card.default_guidance_scale
    strength = request.strength if request.HasField("strength") else DEFAULT_STRENGTH
    return check_sampling(
        card,
        sampler=sampler,
        steps=request.steps if request.HasField("steps") else sampler_steps(sampler, card.default_steps),
        guidance=convert.guidance_from_pb(
            scale, request.guidance, card=card, true_cfg_scale=convert.true_cfg_scale(request)
        ),
        strength=strength if request.init_image or request.HasField("strength") else None,
        size_px=(request.width or card.default_width, request.height or card.default_height),
    )


def _check_size(request: types_pb2.GenerateRequest, card: ModelCard, settings: GatewaySettings) -> None:
    for field, size_px in (("width", request.width), ("height", request.height)):
        if size_px:
            check_size(card, field, size_px)
    filled = types_pb2.GenerateRequest(
        prompts=request.prompts,
        class_labels=request.class_labels,
        num_images=request.num_images,
        width=request.width or card.default_width,
        height=request.height or card.default_height,
    )
    most, whose = settings.max_reserved_bytes, "this deployment"
    if 0 < settings.max_tenant_reserved_bytes < most:
        most, whose = settings.max_tenant_reserved_bytes, "a tenant of this deployment"
    if reserved_bytes(filled) > most:
        given = f"{num_images(request)} images of {filled.width} x {filled.height}"
        raise InvalidRequestError("num_images", given, f"what {whose} can hold", "ask for fewer or smaller images")


def _check_images(request: types_pb2.GenerateRequest, settings: GatewaySettings) -> None:
    if request.mask_image and not request.init_image:
        given = f"{len(request.mask_image)} bytes"
        raise InvalidRequestError("mask_image", given, "only with init_image", "send the image to repaint")
    if request.HasField("strength") and not request.init_image:
        raise InvalidRequestError("strength", request.strength, "only with init_image")
    images = {"init_image": request.init_image, "mask_image": request.mask_image}
    for field, data in {**images, "control.image": request.control.image}.items():
        if len(data) > settings.max_image_bytes:
            raise InvalidRequestError(field, f"{len(data)} bytes", f"at most {settings.max_image_bytes} bytes")


def _check_variant(request: types_pb2.GenerateRequest, card: ModelCard) -> None:
    check_variant(card, convert.variant_from_pb(request))
    check_control_image(
        request.control.name, bool(request.control.image), convert.control_scale_from_pb(request.control)
    )


def _check_output(request: types_pb2.GenerateRequest, card: ModelCard) -> None:
    output = request.output
    _check_enum("output.format", output.format, types_pb2.ImageFormat.items())
    _check_enum("output.decoder", output.decoder, types_pb2.DecoderKind.items())
    _check_range("output.quality", output.quality, 0, 100)
    if output.decoder and convert.decoder_from_pb(output.decoder) not in card.decoders:
        allowed = "one of " + ", ".join(card.decoders)
        raise InvalidRequestError("output.decoder", convert.decoder_from_pb(output.decoder).value, allowed)


def _check_range(field: str, value: float, least: float, most: float) -> None:
    # A comparison with NaN is false, so it fails here.
    if not least <= value <= most or not math.isfinite(value):
        raise InvalidRequestError(field, value, f"{least:g} to {most:g}")


def _check_enum(field: str, value: int, items: Sequence[tuple[str, int]]) -> None:
    names: Mapping[int, str] = {number: name for name, number in items}
    if value not in names:
        raise InvalidRequestError(field, value, "one of " + ", ".join(names.values()))


def _default(request: types_pb2.GenerateRequest, field: str, value: float) -> None:
    if not request.HasField(field):
        setattr(request, field, value)
