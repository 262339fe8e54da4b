"""Picture files round trip, hostile ones are refused, and the pool outlives its children but not its parent."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.stages.imaging import METADATA_KEY, ImagePool, decode_mask, decode_rgb, encode_image, load_upload
from streamflow.types import ImageFormat

GRADIENT = np.stack(np.broadcast_arrays(np.arange(48)[None, :] * 5, np.arange(32)[:, None] * 7, 90), -1).astype(
    np.uint8
)
SIZE = (48, 32)


def test_png_and_raw_keep_every_byte() -> None:
    assert np.array_equal(decode_rgb(encode_image(GRADIENT, ImageFormat.PNG), size=SIZE), GRADIENT)
    raw = encode_image(GRADIENT, ImageFormat.RAW)
    assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(GRADIENT.shape), GRADIENT)


@pytest.mark.parametrize(("image_format", "name"), [(ImageFormat.JPEG, "JPEG"), (ImageFormat.WEBP, "WEBP")])
def test_lossy_formats_stay_close_and_obey_quality(image_format: ImageFormat, name: str) -> None:
    fine, coarse = (encode_image(GRADIENT, image_format, quality=quality) for quality in (95, 20))
    assert len(coarse) < len(fine)
    decoded = decode_rgb(fine, size=SIZE, formats=(name,))
    assert np.abs(decoded.astype(int) - GRADIENT).mean() < 4


@pytest.mark.parametrize("image_format", [ImageFormat.PNG, ImageFormat.JPEG, ImageFormat.WEBP])
def test_metadata_is_in_the_file_only_when_given(image_format: ImageFormat) -> None:
    given = {"seed": 2**63, "sampler": "euler", "model_revision": "äöü"}
    with_it = Image.open(io.BytesIO(encode_image(GRADIENT, image_format, metadata=given)))
    text = with_it.info[METADATA_KEY] if image_format is ImageFormat.PNG else with_it.getexif()[0x010E]
    assert json.loads(text) == given
    without = Image.open(io.BytesIO(encode_image(GRADIENT, image_format)))
    assert METADATA_KEY not in without.info
    assert not without.getexif()


@pytest.mark.parametrize("pixels", [GRADIENT.astype(np.float32), GRADIENT[..., 0], np.zeros((4, 4, 4), np.uint8)])
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="allowed: uint8"):
        encode_image(pixels, ImageFormat.PNG)


def test_mask_is_read_as_brightness() -> None:
    mask = np.where(GRADIENT[..., :1] > 100, 255, 0).astype(np.uint8).repeat(3, axis=2)
    assert np.array_equal(decode_mask(encode_image(mask, ImageFormat.PNG), size=SIZE), mask[..., 0])


def test_uploads_are_resized() -> None:
    loaded = load_upload(encode_image(GRADIENT, ImageFormat.JPEG, quality=95), size=(24, 16))
    assert loaded.shape == (16, 24, 3)
    assert np.abs(loaded.astype(int) - GRADIENT[::2, ::2]).mean() < 8


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


PNG = encode_image(GRADIENT, ImageFormat.PNG)
HOSTILE = {
    "empty": b"",
    "text": b"GIF89a is what this is not",
    "cut": PNG[: len(PNG) // 2],
    "bomb": png_header(65535, 65535),
    "over the limit": png_header(2001, 2000),
    "no size": png_header(0, 0),
    "another format": encode_image(GRADIENT, ImageFormat.JPEG),
    "pickle": b"\x80\x04\x95" + bytes(64),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused_with_what_is_allowed(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="allowed"):
        decode_rgb(data, size=SIZE)


@pytest.mark.parametrize("name", ["bomb", "over the limit", "cut", "text"])
def test_hostile_uploads_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="image: got"):
        load_upload(HOSTILE[name], size=SIZE)


def children() -> list[psutil.Process]:
    """The pool's processes; multiprocessing's resource tracker is none of them."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


async def test_pool_survives_a_killed_child_and_gives_equal_bytes() -> None:
    async with ImagePool(1) as pool:
        [child] = children()
        assert await pool.encode(GRADIENT, ImageFormat.PNG) == PNG
        os.kill(child.pid, signal.SIGKILL)
        # Without taking its exit status, which belongs to the pool.
        with contextlib.suppress(ChildProcessError):
            await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert await asyncio.gather(*(pool.encode(GRADIENT, ImageFormat.PNG) for _ in range(3))) == [PNG] * 3
        [replacement] = children()
        assert replacement.pid != child.pid
        assert not [mapped.path for mapped in replacement.memory_maps() if "torch" in mapped.path]
    assert children() == []


async def test_a_picture_that_kills_its_process_twice_fails_alone() -> None:
    async with ImagePool(1) as pool:
        with pytest.raises(GenerationError, match="died twice"):
            await pool.encode(Suicide(), ImageFormat.PNG)  # type: ignore[arg-type]
        assert await pool.encode(GRADIENT, ImageFormat.PNG) == PNG


class Suicide:
    """Ends the process that unpacks it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return signal.raise_signal, (signal.SIGKILL,)


PARENT = """
import asyncio, sys
from streamflow.stages.imaging import ImagePool

async def main():
    async with ImagePool(2):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_children_die_with_a_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        offspring = psutil.Process(parent.pid).children(recursive=True)
        assert sum("spawn_main" in " ".join(child.cmdline()) for child in offspring) == 2
        parent.kill()
    assert psutil.wait_procs(offspring, timeout=20)[1] == []
