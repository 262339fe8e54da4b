"""One image of a request, read from what the gateway wrote down when it admitted the job.

The bytes come from another process, so everything that could hurt is checked again against this replica's model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Program, Role
from streamflow.rpc.convert import (
    control_scale_from_pb,
    guidance_from_pb,
    output_from_pb,
    texts_from_pb,
    true_cfg_scale,
    variant_from_pb,
)
from streamflow.types import ModelCard, OutputSpec, Variant
from streamflow.v1 import types_pb2
from streamflow.validation import (
    check_control_image,
    check_sampling,
    check_size,
    check_subjects,
    check_true_cfg_scale,
    check_variant,
    texts_for,
)

DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image, with every default filled in.

    Attributes:
        index: of the image in the request; it decides prompt and seed.
        texts: those that the program needs; a label is a number as text.
        guidance_scale: as it was asked for, whatever becomes of it in `guidance`.
        seed: of this image.
        init_image_blob, mask_blob, control_blob: SHA-256 of PNGs of width x height; "" where there is none.
        variant: of the model: adapters and ControlNet.
    """

    index: int
    texts: Mapping[Role, str]
    seed: int
    steps: int
    guidance: Guidance
    guidance_scale: float
    sampler: str
    program: Program
    width: int
    height: int
    strength: float
    init_image_blob: str
    mask_blob: str
    output: OutputSpec
    preview_interval_steps: int
    model: str
    variant: Variant
    control_blob: str
    control_scale: float


def read_request(spec: bytes, index: int, card: ModelCard) -> ImageRequest:
    """Image `index` of a serialized JobSpec.

    Raises:
        GenerationError: the bytes are no JobSpec, it is for another model, or a value is out of this model's limits.
    """
    try:
        return _read(types_pb2.JobSpec.FromString(spec), index, card)
    except (DecodeError, ValueError) as error:
        raise GenerationError(f"the job's specification cannot be used: {error}") from error


def _read(spec: types_pb2.JobSpec, index: int, card: ModelCard) -> ImageRequest:
    request = spec.request
    if spec.model_revision != card.revision:
        raise InvalidRequestError("model_revision", spec.model_revision, f"{card.revision}, which this replica runs")
    per_prompt = request.num_images or 1
    subjects = texts_from_pb(request)
    if not 0 <= index < len(subjects) * per_prompt:
        raise InvalidRequestError("index", index, f"less than {len(subjects) * per_prompt}")
    beside = {"negative_prompt": request.negative_prompt, "source_prompt": request.source_prompt}
    check_subjects(card, request.prompts, request.class_labels, most=len(subjects), **beside)
    check_true_cfg_scale(card, true_cfg_scale(request), request.negative_prompt)
    check_size(card, "width", request.width)
    check_size(card, "height", request.height)
    if spec.mask_blob and not spec.init_image_blob:
        raise InvalidRequestError("mask_blob", spec.mask_blob, "only together with init_image_blob")
    variant, control_scale = variant_from_pb(request), control_scale_from_pb(request.control)
    check_variant(card, variant)
    check_control_image(variant.control, bool(spec.control_blob), control_scale)
    scale, true_scale = request.guidance_scale, true_cfg_scale(request)
    guidance = guidance_from_pb(scale, request.guidance, card=card, true_cfg_scale=true_scale)
    strength = request.strength if request.HasField("strength") else DEFAULT_STRENGTH
    program = check_sampling(
        card,
        sampler=request.sampler,
        steps=request.steps,
        guidance=guidance,
        strength=strength if spec.init_image_blob else None,
        size_px=(request.width, request.height),
    )
    texts = texts_for(
        program,
        prompt=subjects[index // per_prompt],
        negative_prompt=request.negative_prompt,
        source_prompt=request.source_prompt,
        sampler=request.sampler,
    )
    return ImageRequest(
        index=index,
        texts=texts,
        seed=(request.seed + index) % 2**64,
        steps=request.steps,
        guidance=guidance,
        guidance_scale=scale,
        sampler=request.sampler,
        program=program,
        width=request.width,
        height=request.height,
        strength=strength,
        init_image_blob=spec.init_image_blob,
        mask_blob=spec.mask_blob,
        output=checked_output(request.output, card),
        preview_interval_steps=request.preview_interval_steps,
        model=request.model or card.name,
        variant=variant,
        control_blob=spec.control_blob,
        control_scale=control_scale,
    )


def checked_output(output: types_pb2.OutputOptions, card: ModelCard) -> OutputSpec:
    """The output options with defaults filled in. Raises ValueError for a value that does not exist."""
    spec = output_from_pb(output, decoder=card.default_decoder)
    if not 1 <= spec.quality <= 100:
        raise InvalidRequestError("output.quality", spec.quality, "1 to 100")
    return spec
