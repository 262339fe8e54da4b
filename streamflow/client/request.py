"""From the arguments of a call to a GenerateRequest."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import inf
from typing import Any, TypedDict, TypeVar

from google.protobuf.descriptor import FieldDescriptor

from streamflow.client.arguments import check_text
from streamflow.errors import InvalidRequestError
from streamflow.flow.guidance import GuidanceMode, read_interval
from streamflow.pictures import Picture, as_file
from streamflow.rpc.convert import decoder_to_pb, format_to_pb, guidance_mode_to_pb
from streamflow.types import DecoderKind, ImageFormat
from streamflow.v1 import types_pb2

_PRIORITIES: Mapping[str, types_pb2.Priority] = {
    "low": types_pb2.PRIORITY_LOW,
    "normal": types_pb2.PRIORITY_NORMAL,
    "high": types_pb2.PRIORITY_HIGH,
}
_ALLOWED: Mapping[int, str] = {
    FieldDescriptor.TYPE_UINT32: "an integer from 0 to 2**32 - 1",
    FieldDescriptor.TYPE_UINT64: "an integer from 0 to 2**64 - 1",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_STRING: "a string that UTF-8 can carry",
    FieldDescriptor.TYPE_BOOL: "True or False",
}

_POSITIVE = frozenset({"num_images", "width", "height"})
"""Where the message's 0 stands for the default, which a caller writes as None."""

Choice = TypeVar("Choice", bound=StrEnum)


class GenerateOptions(TypedDict, total=False):
    """What `generate`, `stream` and `submit` take beside the prompt. None, or left out: the model's default.

    Attributes:
        negative_prompt: what to steer away from; it has an effect only where guidance_scale > 1.
        steps: of the sampler's schedule; some samplers evaluate the network twice in a step.
        time_budget_s: in place of steps: how long the request may take. The server chooses steps (`min_steps` at
            least), and sampler and decoder where they are left out, and reports them with `Accepted`.
        guidance_scale: classifier-free guidance; 1 or less = the conditional prediction alone.
        seed: of image 0, in [0, 2**64); image k (over all prompts, in order) uses seed + k. Left out, it follows from
            the request id, so it differs from request to request.
        num_images: pictures per prompt.
        width, height: pixels.
        guidance_interval: sigmas between which guidance acts, such as (0.9, 0.2); 1 = noise, 0 = data.
        guidance_mode: "full", or one of the experimental "self-negative" and "onetime-negative", which spare the second
            network row; `residual_strength` in [0, 1] scales what they steer away from.
        sampler: a name with options in brackets, such as "euler", or blocks, such as "H2P4R2".
        image, strength: a picture to start from, and how far it is changed, in (0, 1].
        mask: white = repaint, black = keep; the size of `image`.
        source_prompt: what `image` shows, for the sampler "flowedit".
        format: "png", "jpeg", "webp" or "raw" (height x width x 3 bytes).
        quality: 1 to 100, for JPEG and WebP.
        decoder: "tiny" (fast) or "full" (best).
        embed_metadata: write seed, steps, sampler and model revision into the file as well.
        preview_interval_steps: a preview after every so many steps; 0 = none.
        priority: "low", "normal" or "high".
        model: a name from `models()`.
        class_labels: for class-conditional models, in place of prompts.
        true_cfg_scale: guidance with the negative prompt, for models that are fed guidance_scale (FLUX).
        adapters: names of LoRA adapters, or a mapping from names to weights; `models()` tells the names.
        control: the name of a ControlNet, with `control_image`, the picture that it reads, and `control_scale`, how
            strongly it acts (1 unless given).
        request_id: 1 to 64 of A-Z a-z 0-9 . _ -; sending the same request with the same id again attaches to the
            job instead of starting another. Such a job is shared: leaving it early does not cancel it, `cancel` does,
            and it ends some seconds after the last client has left. Left out, the client makes an id of its own.
    """

    negative_prompt: str | None
    steps: int | None
    time_budget_s: float | None
    min_steps: int | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    guidance_mode: str | None
    residual_strength: float | None
    seed: int | None
    num_images: int
    width: int | None
    height: int | None
    sampler: str | None
    image: Picture | None
    strength: float | None
    mask: Picture | None
    source_prompt: str | None
    format: str
    quality: int | None
    decoder: str | None
    embed_metadata: bool
    preview_interval_steps: int
    priority: str
    model: str | None
    class_labels: Sequence[int]
    true_cfg_scale: float | None
    adapters: Mapping[str, float] | Sequence[str]
    control: str | None
    control_image: Picture | None
    control_scale: float | None
    request_id: str | None


def build_request(
    prompt: str | Sequence[str],
    *,
    request_id: str | None = None,
    seed: int | None = None,
    image: Picture | None = None,
    mask: Picture | None = None,
    format: str = "png",  # noqa: A002
    quality: int | None = None,
    decoder: str | None = None,
    embed_metadata: bool = False,
    priority: str = "normal",
    guidance_interval: tuple[float, float] | None = None,
    guidance_mode: str | None = None,
    residual_strength: float | None = None,
    adapters: Mapping[str, float] | Sequence[str] = (),
    control: str | None = None,
    control_image: Picture | None = None,
    control_scale: float | None = None,
    detach: bool = False,
    **plain: Any,
) -> types_pb2.GenerateRequest:
    """The message for one call; the server checks what depends on the model.

    Args:
        plain: fields that are sent as they are; see GenerateOptions.

    Raises:
        InvalidRequestError: a value that the message cannot carry, or a picture that cannot be read.
        TypeError: an option that does not exist.
    """
    unknown = plain.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}; see streamflow.client.GenerateOptions")
    if prompt is None:
        raise InvalidRequestError("prompt", prompt, "a string, or several")
    request_id = check_text("request_id", request_id) if request_id else new_request_id()
    request = types_pb2.GenerateRequest(detach=detach)
    fields = {
        "request_id": request_id,
        "prompts": [prompt] if isinstance(prompt, str) else prompt,
        "seed": seed_of(request_id) if seed is None else seed,
        **plain,
    }
    for name, value in fields.items():
        _set(request, name, value)
    request.priority = _priority(priority)
    if guidance_interval is not None:
        start, end = read_interval(guidance_interval)
        _set(request.guidance, "start_sigma", start)
        _set(request.guidance, "end_sigma", end)
    if guidance_mode is not None:
        request.guidance.mode = guidance_mode_to_pb(_choice("guidance_mode", GuidanceMode, guidance_mode))
    _set(request.guidance, "residual_strength", residual_strength)
    request.init_image = b"" if image is None else as_file("image", image)
    request.mask_image = b"" if mask is None else as_file("mask", mask)
    for name, weight in _weights(adapters).items():
        adapter = request.adapters.add()
        _set(adapter, "name", name)
        _set(adapter, "weight", weight)
    if control is not None or control_image is not None or control_scale is not None:
        _set(request.control, "name", control)
        request.control.image = b"" if control_image is None else as_file("control_image", control_image)
        _set(request.control, "scale", control_scale)
    _set(request.output, "format", format_to_pb(image_format(format)))
    _set(request.output, "quality", quality)
    _set(request.output, "embed_metadata", embed_metadata)
    if decoder is not None:
        request.output.decoder = decoder_to_pb(_choice("decoder", DecoderKind, decoder))
    return request


def _weights(adapters: Mapping[str, float] | Sequence[str]) -> Mapping[str, float | None]:
    """By name; None = the server's default."""
    if isinstance(adapters, Mapping):
        return adapters
    return dict.fromkeys([adapters] if isinstance(adapters, str) else adapters)


def budget_s(request: types_pb2.GenerateRequest) -> float:
    """The request's time budget in seconds; infinite where it has none."""
    return request.time_budget_s if request.HasField("time_budget_s") else inf


def new_request_id() -> str:
    return uuid.uuid4().hex


def seed_of(request_id: str) -> int:
    """The seed of a request that names none, in [0, 2**32).

    The client chooses it, and from the id alone, so that sending the request again is the same request: it attaches,
    and where the server has lost everything it makes the same pictures.
    """
    return int.from_bytes(hashlib.sha256(request_id.encode("utf-8", "replace")).digest()[:4], "big")


def image_format(name: str) -> ImageFormat:
    """By name; "jpg" is one too. Raises InvalidRequestError."""
    return _choice("format", ImageFormat, "jpeg" if name == "jpg" else name)


def _set(message: Any, name: str, value: Any) -> None:
    """Sets a field where there is a value; protobuf's own refusals name neither the field nor what is allowed."""
    if value is None:
        return
    descriptor = message.DESCRIPTOR.fields_by_name[name]
    now = getattr(message, name)
    try:
        # Protobuf takes True for 1, and bytes for text.
        if (type(value) in (bool, bytes) and type(value) is not type(now)) or (name in _POSITIVE and value == 0):
            raise TypeError
        if isinstance(now, str | int | float):
            setattr(message, name, value)
        else:
            getattr(message, name).extend(value)
    except (TypeError, ValueError):
        allowed = "1 or more" if name in _POSITIVE else _ALLOWED.get(descriptor.type, "another value")
        raise InvalidRequestError(name, value, allowed) from None


def _choice(field: str, kind: type[Choice], value: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequestError(field, value, ", ".join(kind)) from None


def _priority(value: str) -> types_pb2.Priority:
    if value not in _PRIORITIES:
        raise InvalidRequestError("priority", value, ", ".join(_PRIORITIES))
    return _PRIORITIES[value]
