"""Picture files round trip, hostile ones are refused, and the pool outlives its children but not its parent."""

from __future__ import annotations

import asyncio
import contextlib
import gc
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
from streamflow.stages.imaging import METADATA_KEY, ImagePool, decode_mask, decode_rgb, encode_image
from streamflow.types import ImageFormat

GRADIENT = np.stack(np.broadcast_arrays(np.arange(48)[None, :] * 5, np.arange(32)[:, None] * 7, 90), -1).astype(
    np.uint8
)
SIZE = (48, 32)


def test_png_and_raw_keep_every_byte() -> None:
    assert np.array_equal(decode_rgb(encode_image(GRADIENT, ImageFormat.PNG), size=SIZE), GRADIENT)
    raw = encode_image(GRADIENT, ImageFormat.RAW)
    assert np.array_equal(np.frombuffer(raw, np.uint8).reshape(GRADIENT.shape), GRADIENT)


def test_files_hold_a_picture_and_nothing_besides() -> None:
    png, jpeg, webp = (encode_image(GRADIENT, kind) for kind in (ImageFormat.PNG, ImageFormat.JPEG, ImageFormat.WEBP))
    chunks, at = [], 8
    while at < len(png):
        chunks.append(png[at + 4 : at + 8])
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    assert {*chunks} == {b"IHDR", b"IDAT", b"IEND"}
    # EXIF and ICC profiles of a JPEG are in application segments, of which JFIF's own is the first.
    assert not any(jpeg.count(bytes([0xFF, marker])) for marker in range(0xE1, 0xF0))
    assert webp[12:16] == b"VP8 "
    assert len(webp) == 8 + int.from_bytes(webp[4:8], "little")
    for data in (png, jpeg, webp):
        with Image.open(io.BytesIO(data)) as image:
            assert not image.getexif()
            assert "icc_profile" not in image.info


@pytest.mark.parametrize(("image_format", "name"), [(ImageFormat.JPEG, "JPEG"), (ImageFormat.WEBP, "WEBP")])
def test_lossy_formats_stay_close_and_obey_quality(image_format: ImageFormat, name: str) -> None:
    fine, coarse = (encode_image(GRADIENT, image_format, quality=quality) for quality in (95, 20))
    assert len(coarse) < len(fine)
    decoded = np.asarray(Image.open(io.BytesIO(fine), formats=(name,)))
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


def children() -> list[psutil.Process]:
    """The pool's processes; multiprocessing's resource tracker is none of them."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if "spawn_main" in " ".join(child.cmdline()) else []
    return found


async def children_left(count: int) -> list[psutil.Process]:
    """Waits until there are so many: what had a picture alone ends a little after it."""
    async with asyncio.timeout(20):
        while len(found := children()) != count:  # noqa: ASYNC110 processes have no event
            await asyncio.sleep(0.01)
    return found


async def kill(*processes: psutil.Process) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        # Without taking its exit status, which belongs to the pool.
        with contextlib.suppress(ChildProcessError):
            await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def encode_many(pool: ImagePool, count: int) -> list[asyncio.Task[bytes]]:
    return [asyncio.ensure_future(pool.encode(GRADIENT, ImageFormat.PNG)) for _ in range(count)]


async def test_pool_survives_a_killed_child_and_gives_equal_bytes() -> None:
    async with ImagePool(1) as pool:
        [child] = children()
        assert await pool.encode(GRADIENT, ImageFormat.PNG) == PNG
        await kill(child)
        assert await asyncio.gather(*encode_many(pool, 3)) == [PNG] * 3
        # Those were lost with the child; this one is the first of the new pool.
        assert await pool.encode(GRADIENT, ImageFormat.PNG) == PNG
        [replacement] = await children_left(1)
        assert replacement != child
        assert not [mapped.path for mapped in replacement.memory_maps() if "torch" in mapped.path]
    await children_left(0)


@pytest.mark.parametrize("cancelled", [(), (5,), (0, 3)], ids=str)
async def test_pictures_under_way_outlive_killed_children(
    cancelled: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async with ImagePool(2) as pool:
        stopped = children()
        # So that none of the pictures is finished before they are killed.
        for child in stopped:
            child.suspend()
        under_way = encode_many(pool, 8)
        # Lets each task run up to its first wait, where its picture has been submitted.
        await asyncio.sleep(0)
        for index in cancelled:
            under_way[index].cancel()
        await kill(*stopped)
        results = await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), 60)
        for index, result in enumerate(results):
            assert isinstance(result, asyncio.CancelledError) if index in cancelled else result == PNG
    gc.collect()
    # One break, and nothing about exceptions that nobody has read.
    assert [record.levelname for record in caplog.records] == ["WARNING"]


class Suicide:
    """Ends the process that unpacks it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return signal.raise_signal, (signal.SIGKILL,)


@pytest.mark.parametrize("workers", [1, 2])
async def test_only_the_pictures_that_kill_their_process_fail(workers: int) -> None:
    bad = {1, 4}
    given = [Suicide() if index in bad else GRADIENT for index in range(7)]
    async with ImagePool(workers) as pool:
        under_way = [pool.encode(one, ImageFormat.PNG) for one in given]  # type: ignore[arg-type]
        results = await asyncio.gather(*under_way, return_exceptions=True)
        for index, result in enumerate(results):
            if index in bad:
                assert isinstance(result, GenerationError)
                assert "died over this one" in str(result)
            else:
                assert result == PNG
        assert await pool.encode(GRADIENT, ImageFormat.PNG) == PNG


async def test_bad_pictures_that_keep_coming_fail_no_good_one() -> None:
    async with ImagePool(2) as pool:
        good: list[asyncio.Task[bytes]] = []
        for _ in range(3):
            bad = asyncio.ensure_future(pool.encode(Suicide(), ImageFormat.PNG))  # type: ignore[arg-type]
            good += encode_many(pool, 2)
            with pytest.raises(GenerationError, match="died over this one"):
                await bad
        assert await asyncio.gather(*good) == [PNG] * 6


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
