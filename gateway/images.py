"""Init images and masks from clients: bytes of unknown making, decoded within limits.

Bytes, format and pixels are judged by the header before anything is decoded; what goes on is a plain PNG of the
request's size without metadata.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from streamflow.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP")
# A JPEG of a phone may carry more pictures (MPO); the first is the photograph.
_OPENED_AS = (*FORMATS, "MPO")

# What Pillow raises for files that are damaged or made to damage.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True, slots=True)
class SourceImages:
    """PNGs of the request's size: RGB, and L for the mask."""

    init: bytes
    mask: bytes | None


def prepare(init: bytes, mask: bytes, *, width: int, height: int, max_pixels: int) -> SourceImages:
    """Decodes an init image and a mask, turns them upright and resizes them; `mask` may be empty.

    Blocks for as long as the decoding takes.

    Raises:
        InvalidRequestError: not a still PNG, JPEG or WebP of at most `max_pixels`, or damaged; a mask of another size.
    """
    picture = _read("init_image", init, "RGB", max_pixels)
    if not mask:
        return SourceImages(_to_png(picture, width, height), None)
    repaint = _read("mask_image", mask, "L", max_pixels)
    if repaint.size != picture.size:
        given, allowed = (f"{image.width} x {image.height}" for image in (repaint, picture))
        raise InvalidRequestError("mask_image", given, f"{allowed}, the size of init_image")
    return SourceImages(_to_png(picture, width, height), _to_png(repaint, width, height))


def _read(field: str, data: bytes, mode: Literal["RGB", "L"], max_pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(field, image, max_pixels)
            return _convert(ImageOps.exif_transpose(image), mode)
    except InvalidRequestError:
        raise
    except UnidentifiedImageError as error:
        raise InvalidRequestError(field, f"{len(data)} bytes of another kind", "a PNG, JPEG or WebP") from error
    except Image.DecompressionBombError as error:
        raise InvalidRequestError(field, "a picture of far too many pixels", f"at most {max_pixels} pixels") from error
    except _BROKEN as error:
        hint = "it is damaged or incomplete; save it again"
        raise InvalidRequestError(field, f"{len(data)} bytes", "a complete PNG, JPEG or WebP", hint) from error


def _check_header(field: str, image: Image.Image, max_pixels: int) -> None:
    if image.format not in _OPENED_AS:
        raise InvalidRequestError(field, image.format, "a PNG, JPEG or WebP")
    if image.width * image.height > max_pixels:
        hint = "make it smaller: it is resized to the request's width and height anyway"
        raise InvalidRequestError(field, f"{image.width} x {image.height}", f"at most {max_pixels} pixels", hint)
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise InvalidRequestError(field, f"an animation of {image.n_frames} pictures", "a still picture")  # type: ignore[attr-defined]


def _convert(image: Image.Image, mode: Literal["RGB", "L"]) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert(mode)


def _to_png(image: Image.Image, width: int, height: int) -> bytes:
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    # Otherwise the file takes over the colour profile, EXIF and texts.
    resized.info = {}
    out = io.BytesIO()
    resized.save(out, format="PNG", compress_level=1)
    return out.getvalue()
