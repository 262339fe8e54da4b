"""Pictures in every shape that a caller may have them in: the same pixels, or an error that says what is wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gateway.images import prepare
from streamflow.errors import InvalidRequestError
from streamflow.pictures import Picture, as_file, load_source, read

SIZE = (24, 16)
ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (30, 50, 3), np.uint8)


def encode(image: Image.Image, kind: str = "PNG", *, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    out = io.BytesIO()
    image.save(out, kind, exif=exif)
    return out.getvalue()


FILES = {
    "JPEG turned right": encode(Image.fromarray(COLOURS), "JPEG", orientation=6),
    "WebP mirrored": encode(Image.fromarray(COLOURS), "WEBP", orientation=2),
    "16 bits": encode(Image.fromarray(RNG.integers(0, 2**16, (30, 50), np.uint16))),
    "16 bits turned left": encode(Image.fromarray(RNG.integers(0, 2**16, (30, 50), np.uint16)), orientation=8),
    "CMYK": encode(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"),
    "transparent": encode(Image.fromarray(RNG.integers(0, 256, (30, 50, 4), np.uint8))),
    "palette": encode(Image.fromarray(COLOURS).convert("P")),
    "black and white": encode(Image.fromarray(COLOURS).convert("1")),
}


def shapes_of(data: bytes, folder: Path) -> dict[str, Picture]:
    path = folder / "picture"
    path.write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    return {"bytes": data, "path": path, "text": str(path), "opened": opened, "decoded": opened.copy()}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_every_shape_gives_the_pixels_that_the_gateway_stores(data: bytes, tmp_path: Path) -> None:
    stored = prepare(data, data, width=SIZE[0], height=SIZE[1], max_pixels=10_000)
    assert stored.mask is not None
    expected = [np.asarray(Image.open(io.BytesIO(png))) for png in (stored.init, stored.mask)]
    for shape, picture in shapes_of(data, tmp_path).items():
        source = load_source(picture, picture, size=SIZE)
        assert source.mask is not None
        assert np.array_equal(source.image, expected[0]), shape
        assert np.array_equal(source.mask, expected[1]), shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(orientation: int) -> None:
    upright = COLOURS
    # What a camera held in this way writes down: the inverse of what a viewer does.
    written = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    data = encode(Image.fromarray(np.ascontiguousarray(written)), orientation=orientation)
    assert np.array_equal(np.asarray(read("image", data, "RGB")), upright)


def test_sixteen_bits_keep_their_upper_eight_also_when_turned() -> None:
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 0x0A0B
    data = encode(Image.fromarray(values), orientation=6)
    assert np.array_equal(np.asarray(read("image", data, "L")), np.rot90(values >> 8, -1))


def test_what_is_given_is_left_as_it_was() -> None:
    opened = Image.open(io.BytesIO(FILES["JPEG turned right"]))
    read("image", opened, "L")
    assert (opened.mode, opened.size, opened.getexif()[ORIENTATION]) == ("RGB", (50, 30), 6)


def test_the_limit_is_for_files() -> None:
    data = encode(Image.new("L", (101, 100)))
    with pytest.raises(InvalidRequestError, match=r"image: got '101 x 100'; allowed: at most 10000 pixels"):
        read("image", data, "L", max_pixels=10_000)
    assert read("image", Image.open(io.BytesIO(data)), "L", max_pixels=10_000).size == (101, 100)


def test_only_the_formats_asked_for_are_opened() -> None:
    with pytest.raises(InvalidRequestError, match=r"of another kind'; allowed: a PNG$"):
        read("image", FILES["WebP mirrored"], "RGB", formats=("PNG",))


def test_a_mask_is_compared_upright() -> None:
    flat = Image.new("L", (50, 30))
    with pytest.raises(InvalidRequestError, match=r"mask: got '50 x 30'; allowed: 30 x 50, the size of image"):
        load_source(FILES["JPEG turned right"], flat, size=SIZE, names=("image", "mask"))
    assert load_source(FILES["JPEG turned right"], flat.rotate(90, expand=True), size=SIZE).mask is not None


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("no/such/file.png", r"image: got 'no/such/file.png'; allowed: a file that can be read; No such file"),
        (Path("/"), "a file that can be read; it is none"),
        (Image.open(io.BytesIO(FILES["16 bits"][:200])), "a picture that can be read; .*truncated"),
        (COLOURS, "allowed: a PIL image, the bytes of a picture file, or the path of one"),
        (7, "image: got 7; allowed: a PIL image"),
    ],
    ids=["missing", "folder", "cut", "array", "number"],
)
def test_what_cannot_be_read_is_named(picture: Picture, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read("image", picture, "RGB")


def test_a_pil_image_as_a_file_reads_like_the_image_itself() -> None:
    plain = Image.fromarray(COLOURS)
    turned = Image.open(io.BytesIO(encode(plain, "JPEG", orientation=6)))
    for picture in (plain, turned, plain.convert("CMYK"), plain.convert("P"), plain.convert("L")):
        again = read("image", as_file("image", picture), "RGB")
        assert np.array_equal(np.asarray(again), np.asarray(read("image", picture, "RGB")))
    assert read("image", as_file("image", turned), "RGB").size == (30, 50)


def test_what_is_no_file_or_an_empty_one_is_refused_before_it_is_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    for picture, says in (
        (empty, "0 bytes in empty.png"),
        (b"", "the bytes of a picture file"),
        (Path("/dev/zero"), "a file"),
        (tmp_path, "a file"),
        (tmp_path / "nowhere.png", "No such file"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            as_file("image", picture)
