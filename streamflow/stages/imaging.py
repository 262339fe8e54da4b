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
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Self

import numpy as np
from PIL import Image, PngImagePlugin

from streamflow import pictures
from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.processes import die_with_parent
from streamflow.types import ImageFormat

METADATA_KEY = "streamflow"

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


def decode_rgb(data: bytes, *, size: tuple[int, int]) -> np.ndarray:
    """Reads a PNG that already is of `size` (width, height): uint8 [height, width, 3].

    Raises:
        InvalidRequestError: another format or size, or a broken file.
    """
    return np.asarray(_decode(data, "RGB", size))


def decode_mask(data: bytes, *, size: tuple[int, int]) -> np.ndarray:
    """Like `decode_rgb`, as uint8 [height, width]: the brightness."""
    return np.asarray(_decode(data, "L", size))


def _decode(data: bytes, mode: pictures.Mode, size: tuple[int, int]) -> Image.Image:
    width, height = size
    image = pictures.read("image", data, mode, max_pixels=width * height, formats=("PNG",))
    if image.size != size:
        raise InvalidRequestError("image", f"{image.width} x {image.height}", f"{width} x {height} pixels")
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

    When one of them dies, all pictures under way are lost with it, and it cannot be seen which one was to blame. So the
    pool is made anew for the pictures to come, and each of the lost ones is encoded in a process of its own, one after
    the other. The processes die with this one: use the pool from the main thread, because a child's life is tied to the
    thread that started it.

    Args:
        workers: processes.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._executor = _start(workers)
        self._one_at_a_time = asyncio.Lock()

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
            GenerationError: the process died although it had this picture alone.
        """
        write = partial(encode_image, pixels, image_format, quality=quality, metadata=metadata)
        executor = self._executor
        try:
            return await _result(executor, write)
        except BrokenProcessPool:
            self._replace(executor)
        async with self._one_at_a_time:
            return await self._encode_alone(write)

    async def _encode_alone(self, write: Callable[[], bytes]) -> bytes:
        executor = _start(1)
        try:
            return await _result(executor, write)
        except BrokenProcessPool as error:
            raise GenerationError(
                "the process that writes picture files died over this one", stage="decoder"
            ) from error
        finally:
            executor.shutdown(wait=False)

    def _replace(self, broken: ProcessPoolExecutor) -> None:
        # All pictures under way see the same break: the first one replaces the pool.
        if self._executor is broken:
            _log.warning("a process that writes picture files died; starting new ones")
            broken.shutdown(wait=False)
            self._executor = _start(self._workers)


def _start(workers: int) -> ProcessPoolExecutor:
    # Spawn: forking a process that runs torch and gRPC threads can deadlock.
    context = get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_child, initargs=(os.getpid(),))


async def _result(executor: ProcessPoolExecutor, write: Callable[[], bytes]) -> bytes:
    done = asyncio.wrap_future(executor.submit(write))
    # Nobody reads it when the caller has been cancelled, and asyncio would complain.
    done.add_done_callback(lambda one: one.cancelled() or one.exception())
    # Cancelling must not reach it: an executor that breaks with a cancelled picture can leave all others waiting
    # (CPython 3.11.7).
    await asyncio.wait([done])
    return done.result()


def _start_child(parent_pid: int) -> None:
    # Ctrl-C is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)
