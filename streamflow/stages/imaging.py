"""Picture files: encoding and decoding, and a pool of processes that encodes away from the event loop.

Without torch: the pool's children import this module and nothing heavier.

PNG is written at compression level 1 and WebP with method 0: the higher ones take many times longer for files that are
a little smaller.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Self

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.processes import die_with_parent
from streamflow.types import ImageFormat

METADATA_KEY = "streamflow"
MAX_PIXELS = 4_000_000
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")

_EXIF_DESCRIPTION = 0x010E
_log = logging.getLogger(__name__)


def encode_image(
    pixels: np.ndarray, image_format: ImageFormat, *, quality: int = 90, metadata: Mapping[str, object] | None = None
) -> bytes:
    """Writes a picture file.

    Args:
        pixels: uint8 [height, width, 3].
        quality: 1 to 100, for JPEG and WebP.
        metadata: written into the file as one JSON object: in a PNG text chunk named `streamflow`, in the description
            field of EXIF for JPEG and WebP, nowhere for raw bytes.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels: got {pixels.dtype} {list(pixels.shape)}, allowed: uint8 [height, width, 3]")
    if image_format is ImageFormat.RAW:
        return pixels.tobytes()
    text = json.dumps(dict(metadata), sort_keys=True) if metadata else ""
    image, file = Image.fromarray(pixels), io.BytesIO()
    match image_format:
        case ImageFormat.PNG:
            image.save(file, "PNG", compress_level=1, pnginfo=_png_text(text))
        case ImageFormat.JPEG:
            image.save(file, "JPEG", quality=quality, exif=_exif(text))
        case ImageFormat.WEBP:
            image.save(file, "WEBP", quality=quality, method=0, exif=_exif(text))
    return file.getvalue()


def decode_rgb(data: bytes, *, size: tuple[int, int], formats: tuple[str, ...] = ("PNG",)) -> np.ndarray:
    """Reads a picture file that already is of `size` (width, height): uint8 [height, width, 3].

    Raises:
        InvalidRequestError: another format or size, or a broken file.
    """
    return np.asarray(_open(data, formats, size=size).convert("RGB"))


def decode_mask(data: bytes, *, size: tuple[int, int], formats: tuple[str, ...] = ("PNG",)) -> np.ndarray:
    """Like `decode_rgb`, as uint8 [height, width]: the brightness."""
    return np.asarray(_open(data, formats, size=size).convert("L"))


def load_upload(data: bytes, *, size: tuple[int, int]) -> np.ndarray:
    """Reads a PNG, JPEG or WebP of at most 4 megapixels and resizes it.

    Args:
        size: width and height in pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        InvalidRequestError: another format, too large, or a broken file.
    """
    image = _open(data, UPLOAD_FORMATS).convert("RGB")
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS))


def _open(data: bytes, formats: tuple[str, ...], *, size: tuple[int, int] | None = None) -> Image.Image:
    """The decoded first frame; the header is checked first, because a small file can hold a huge picture."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if size is not None and image.size != size:
            raise InvalidRequestError("image", f"{image.width} x {image.height}", f"{size[0]} x {size[1]} pixels")
        if image.width * image.height > MAX_PIXELS:
            raise InvalidRequestError("image", f"{image.width} x {image.height}", f"at most {MAX_PIXELS} pixels")
        image.load()
    except InvalidRequestError:
        raise
    # Broken files make Pillow raise nearly anything: SyntaxError, struct.error, ValueError, DecompressionBombError.
    except UnidentifiedImageError as error:
        raise InvalidRequestError("image", f"{len(data)} bytes of another format", ", ".join(formats)) from error
    except Exception as error:
        raise InvalidRequestError(
            "image", f"a broken file ({type(error).__name__})", "a complete " + ", ".join(formats)
        ) from error
    return image


def _png_text(text: str) -> PngImagePlugin.PngInfo | None:
    if not text:
        return None
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, text)
    return info


def _exif(text: str) -> bytes:
    if not text:
        return b""
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = text
    return exif.tobytes()


class ImagePool:
    """Processes that encode pictures.

    They die with this process, and when one of them is killed the pool is made anew and the picture tried once more.
    Use it from the main thread: a child's life is tied to the thread that started it.

    Args:
        workers: processes.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._executor = self._start()

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(asyncio.wrap_future(self._executor.submit(os.getpid)) for _ in range(self._workers)))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)

    async def encode(
        self,
        pixels: np.ndarray,
        image_format: ImageFormat,
        *,
        quality: int = 90,
        metadata: Mapping[str, object] | None = None,
    ) -> bytes:
        """`encode_image` in a child process.

        Raises:
            GenerationError: the process died twice over this picture.
        """
        for _ in range(2):
            executor = self._executor
            try:
                future = executor.submit(encode_image, pixels, image_format, quality=quality, metadata=metadata)
                return await asyncio.wrap_future(future)
            except BrokenProcessPool:
                self._replace(executor)
        raise GenerationError("the process that writes picture files died twice over this picture", stage="decoder")

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        # All pictures under way see the same break: the first one replaces the pool.
        if self._executor is broken:
            _log.warning("a process that writes picture files died; starting new ones")
            broken.shutdown(wait=False)
            self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # Spawn: forking a process that runs torch and gRPC threads can deadlock.
        context = get_context("spawn")
        return ProcessPoolExecutor(self._workers, mp_context=context, initializer=_start_child, initargs=(os.getpid(),))


def _start_child(parent_pid: int) -> None:
    # Ctrl-C is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)
