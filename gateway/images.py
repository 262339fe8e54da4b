"""The images of a request as the stages get them: plain PNGs of the request's size, without metadata."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from streamflow.pictures import load_source
from streamflow.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class SourceImages:
    """PNGs of the request's size: RGB, and L for the mask."""

    init: bytes
    mask: bytes | None


def prepare(init: bytes, mask: bytes, *, width: int, height: int, max_pixels: int) -> SourceImages:
    """Decodes an init image and a mask and resizes them; `mask` may be empty.

    Blocks for as long as the decoding takes.

    Raises:
        InvalidRequestError: see `streamflow.pictures.load_source`.
    """
    source = load_source(init, mask or None, size=(width, height), max_pixels=max_pixels)
    return SourceImages(_to_png(source.image), None if source.mask is None else _to_png(source.mask))


def prepare_all(request: types_pb2.GenerateRequest, *, width: int, height: int, max_pixels: int) -> dict[str, bytes]:
    """All images of a request, by the fields of a JobSpec that refer to them. Blocks, and raises, as `prepare` does."""
    size, found = (width, height), {}
    if request.init_image:
        sources = prepare(request.init_image, request.mask_image, width=width, height=height, max_pixels=max_pixels)
        found["init_image_blob"] = sources.init
        if sources.mask is not None:
            found["mask_blob"] = sources.mask
    if request.control.image:
        names = ("control.image", "")
        control = load_source(request.control.image, size=size, max_pixels=max_pixels, names=names)
        found["control_blob"] = _to_png(control.image)
    return found


def _to_png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=1)
    return out.getvalue()
