"""Pictures from users, read in one way wherever they come in: by the gateway, by a service, or in the fused form.

Bytes, format and pixels of a file are judged by its header before anything is decoded. Without torch.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from streamflow.errors import InvalidRequestError

MAX_PIXELS = 4_000_000
"""Of a file, unless the caller has another limit."""

MAX_PARTS = 300
"""Segments and scans of a JPEG, chunks of a PNG beside its pixels: each takes a few bytes, and costs time or memory."""

_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
MAX_FILE_BYTES = 64 * 2**20

Picture = Image.Image | bytes | str | Path
"""A PIL image, the bytes of a PNG, JPEG or WebP, or the path of one."""

Mode = Literal["RGB", "L"]

_PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A picture to start from, uint8 [height, width, 3], and what of it to repaint, uint8 [height, width]."""

    image: np.ndarray
    mask: np.ndarray | None = None


def load_source(
    image: Picture,
    mask: Picture | None = None,
    *,
    size: tuple[int, int],
    max_pixels: int = MAX_PIXELS,
    names: tuple[str, str] = ("init_image", "mask_image"),
) -> Source:
    """Reads a picture and its mask, and resizes them.

    Blocks for as long as the decoding takes.

    Args:
        size: width and height in pixels.
        max_pixels: of each file; a PIL image, which the caller has opened, may be larger.
        names: of the request's fields, for errors.

    Raises:
        InvalidRequestError: see `read`; a mask of another size than the image.
    """
    picture = read(names[0], image, "RGB", max_pixels=max_pixels)
    if mask is None:
        return Source(_resized(picture, size))
    repaint = read(names[1], mask, "L", max_pixels=max_pixels)
    if repaint.size != picture.size:
        given, allowed = (f"{one.width} x {one.height}" for one in (repaint, picture))
        raise InvalidRequestError(names[1], given, f"{allowed}, the size of {names[0]}")
    return Source(_resized(picture, size), _resized(repaint, size))


def keep_unmasked(pixels: np.ndarray, source: Source) -> np.ndarray:
    """Repainted pixels where the mask is white, the source's where it is black, and mixed where it is gray.

    Args:
        pixels: uint8 [height, width, 3], of the source's size.
    """
    if source.mask is None:
        return pixels
    share = source.mask[..., None].astype(np.uint16)
    return ((pixels * share + source.image * (255 - share) + 127) // 255).astype(np.uint8)


def read(
    field: str,
    picture: Picture,
    mode: Mode,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP"),
) -> Image.Image:
    """A picture as people see it: turned upright, 16 bits scaled to 8, without transparency.

    Args:
        field: named by errors.
        max_pixels, formats: of a file; a PIL image is taken as it is.

    Raises:
        InvalidRequestError: not a still picture of these formats and at most `max_pixels`, damaged, or not readable.
    """
    match picture:
        case bytes():
            return _decode(field, picture, mode, max_pixels, formats)
        case str() | Path():
            return _decode(field, read_file(field, Path(picture)), mode, max_pixels, formats)
        case Image.Image():
            try:
                return _plain(picture, mode)
            # It may have been opened and not decoded yet.
            except Exception as error:
                raise InvalidRequestError(field, picture, "a picture that can be read", str(error)) from error
    raise InvalidRequestError(field, picture, "a PIL image, the bytes of a picture file, or the path of one")


def as_file(field: str, picture: Picture) -> bytes:
    """A picture as the bytes of a file: files as they are, and a PIL image, turned upright, as a PNG.

    Raises:
        InvalidRequestError: it cannot be read, or it is no picture at all.
    """
    match picture:
        case bytes():
            if not picture:
                raise InvalidRequestError(field, picture, "the bytes of a picture file")
            return picture
        case str() | Path():
            return read_file(field, Path(picture))
        case Image.Image():
            file = io.BytesIO()
            try:
                # A PNG keeps no orientation, and has no CMYK, YCbCr and the like.
                upright = ImageOps.exif_transpose(picture)
                (upright if upright.mode in _PNG_MODES else upright.convert("RGB")).save(file, "PNG")
            except (OSError, ValueError) as error:
                raise InvalidRequestError(field, picture, "a picture that can be read", str(error)) from error
            return file.getvalue()
    raise InvalidRequestError(field, picture, "a PIL image, the bytes of a picture file, or the path of one")


def read_file(field: str, path: Path) -> bytes:
    """Raises InvalidRequestError for what is no file, is empty or too large, or cannot be read."""
    try:
        # Looked at first: a device never ends.
        size = path.stat().st_size if path.is_file() or not path.exists() else -1
        if size < 0:
            raise InvalidRequestError(field, str(path), "a file that can be read", "it is none")
        if not 0 < size <= MAX_FILE_BYTES:
            raise InvalidRequestError(field, f"{size} bytes in {path.name}", f"1 to {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(field, str(path), "a file that can be read", error.strerror or "") from error


def _decode(field: str, data: bytes, mode: Mode, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    kinds = " or ".join(formats)
    if _parts(data) > MAX_PARTS:
        given, allowed = f"{len(data)} bytes in very many parts", f"at most {MAX_PARTS} scans, segments or chunks"
        raise InvalidRequestError(field, given, allowed, "save it again as a plain PNG or JPEG")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_header(field, image, max_pixels)
            return _plain(image, mode)
    except InvalidRequestError:
        raise
    except UnidentifiedImageError as error:
        raise InvalidRequestError(field, f"{len(data)} bytes of another kind", f"a {kinds}") from error
    except Image.DecompressionBombError as error:
        raise InvalidRequestError(field, "a picture of far too many pixels", f"at most {max_pixels} pixels") from error
    # Files that are damaged, or made to damage, make Pillow raise nearly anything.
    except Exception as error:
        hint = "it is damaged or incomplete; save it again"
        raise InvalidRequestError(field, f"{len(data)} bytes", f"a complete {kinds}", hint) from error


def _parts(data: bytes) -> int:
    """How many parts a file has, counted no further than just beyond MAX_PARTS."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg_parts(data)
    return _png_parts(data) if data.startswith(b"\x89PNG") else 0


def _jpeg_parts(data: bytes) -> int:
    """Segments, scans, and the fill bytes before them."""
    parts, at = 0, 2
    while parts <= MAX_PARTS and (found := _MARKER.search(data, at)):
        marker = data[found.end() - 1]
        if marker == 0xD9:
            break
        parts += len(found[0]) - 1
        at = found.end()
        if not 0xD0 <= marker <= 0xD8:
            at += int.from_bytes(data[at : at + 2], "big")
    return parts


def _png_parts(data: bytes) -> int:
    parts, at = 0, 8
    while parts <= MAX_PARTS and at + 8 <= len(data):
        parts += data[at + 4 : at + 8] != b"IDAT"
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return parts


def _check_header(field: str, image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        hint = "make it smaller: it is resized to the request's width and height anyway"
        raise InvalidRequestError(field, f"{image.width} x {image.height}", f"at most {max_pixels} pixels", hint)
    frames = getattr(image, "n_frames", 1)
    # A JPEG of a phone may carry more pictures (MPO); the first is the photograph.
    if frames > 1 and image.format != "MPO":
        raise InvalidRequestError(field, f"an animation of {frames} pictures", "a still picture")


def _plain(image: Image.Image, mode: Mode) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # Pillow clips 16 bits to 8 instead of scaling them.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert(mode)


def _resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))
