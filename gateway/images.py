"""Init images and masks as the stages get them: plain PNGs of the request's size, without metadata."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from streamflow.pictures import load_source


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


def _to_png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=1)
    return out.getvalue()
