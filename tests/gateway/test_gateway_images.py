"""Pictures from clients: what is decoded, into what, and what is refused before it costs anything."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from gateway.images import SourceImages, prepare
from streamflow.errors import InvalidRequestError

MAX_PIXELS = 4_000_000


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def picture(width: int = 40, height: int = 20, mode: str = "RGB") -> Image.Image:
    """Left half dark, right half bright."""
    values = np.zeros((height, width), np.uint8)
    values[:, width // 2 :] = 200
    return Image.fromarray(values).convert(mode)


def ready(init: bytes, mask: bytes = b"", width: int = 16, height: int = 8) -> SourceImages:
    return prepare(init, mask, width=width, height=height, max_pixels=MAX_PIXELS)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_and_mode_becomes_an_rgb_png_of_the_size_asked(kind, mode):
    if (kind, mode) in {("JPEG", "RGBA"), ("JPEG", "LA"), ("JPEG", "P"), ("PNG", "CMYK")}:
        pytest.skip(f"there is no {kind} of mode {mode}")
    made = pixels(ready(encode(picture(mode=mode), kind)).init)
    assert made.shape == (8, 16, 3)
    assert made[:, :6].max() < 40
    assert made[:, 10:].min() > 150


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.full((20, 40), 0x4000, np.uint16)
    made = pixels(ready(encode(Image.fromarray(values))).init)
    assert set(np.unique(made)) == {0x40}


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    made = pixels(ready(encode(picture(), "JPEG", exif=exif), width=16, height=32).init)
    assert made[:12].max() < 40
    assert made[20:].min() > 150


def test_no_metadata_goes_on():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "a secret place")
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    for data in (
        encode(picture(), pnginfo=texts, exif=exif),
        encode(picture(), "JPEG", exif=exif, comment=b"a secret place"),
    ):
        made = ready(data).init
        assert b"secret" not in made
        assert Image.open(io.BytesIO(made)).info == {}


def test_a_mask_is_one_channel_of_the_same_size():
    made = ready(encode(picture()), encode(picture(mode="RGBA")))
    assert made.mask is not None
    assert pixels(made.mask).shape == (8, 16)
    assert pixels(made.mask)[4, 15] == 200


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(InvalidRequestError, match=r"mask_image: got '20 x 40'; allowed: 40 x 20") as caught:
        ready(encode(picture()), encode(picture(20, 40)))
    assert caught.value.field == "mask_image"


BOMBS = {
    "9000 x 9000 real": encode(Image.new("1", (9000, 9000))),
    "9000 x 9000 claimed": png_header(9000, 9000),
    "65535 x 65535 claimed": png_header(65535, 65535),
    "2**31 x 2**31 claimed": png_header(2**31 - 1, 2**31 - 1),
    "one pixel too many": png_header(MAX_PIXELS + 1, 1),
    "WebP": encode(Image.new("RGB", (4000, 1001)), "WEBP", quality=1, method=0),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused(data):
    assert len(data) < 100_000
    with pytest.raises(InvalidRequestError, match="pixels") as caught:
        ready(data)
    assert caught.value.field == "init_image"


MEASURE = """
import sys
from pathlib import Path
from gateway.images import prepare
from streamflow.errors import InvalidRequestError

def peak_kib():
    # Not ru_maxrss, which begins with what the process that started us had.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])

def take(path, max_pixels):
    prepare(Path(path).read_bytes(), b"", width=16, height=8, max_pixels=max_pixels)

take(sys.argv[1], 4_000_000)
before = peak_kib()
try:
    take(sys.argv[2], int(sys.argv[3]))
except InvalidRequestError:
    pass
print(peak_kib() - before)
"""


def test_a_bomb_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / "small.png").write_bytes(encode(picture()))
    (tmp_path / "bomb.png").write_bytes(BOMBS["9000 x 9000 real"])

    def grown_kib(max_pixels: int) -> int:
        command = [sys.executable, "-W", "ignore", "-c", MEASURE, tmp_path / "small.png", tmp_path / "bomb.png"]
        return int(subprocess.run([*command, str(max_pixels)], capture_output=True, check=True, timeout=60).stdout)

    assert grown_kib(4_000_000) < 4 * 1024
    # What it would have taken.
    assert grown_kib(100_000_000) > 100 * 1024


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_animations_are_refused(kind):
    frames = [picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    with pytest.raises(InvalidRequestError, match=r"still picture|another kind"):
        ready(encode(frames[0], kind, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PDF", "EPS"])
def test_other_kinds_are_refused(kind):
    with pytest.raises(InvalidRequestError, match="a PNG or JPEG or WEBP"):
        ready(encode(picture(), kind))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_truncated_file_is_refused(kind, kept):
    rng = np.random.default_rng(0)
    data = encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(InvalidRequestError, match="a complete PNG or JPEG or WEBP"):
        ready(data[: int(len(data) * kept)])


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"<svg/>", bytes(1000)]
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(InvalidRequestError):
        ready(data)


SAMPLES = [encode(picture(), "PNG"), encode(picture(), "JPEG"), encode(picture(), "WEBP")]


@settings(max_examples=150)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
def test_damage_gives_a_picture_or_a_refusal(data, damage):
    damaged = bytearray(data)
    for place, value in damage:
        damaged[place % len(damaged)] = value
    with suppress(InvalidRequestError):
        made = ready(bytes(damaged))
        assert pixels(made.init).shape == (8, 16, 3)
