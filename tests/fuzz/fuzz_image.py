"""Bytes as the file of a picture: one within the limits, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator

from tests.fuzz.fuzzing import run, watched

with watched():
    from gateway.images import prepare
    from streamflow import pictures
    from streamflow.errors import InvalidRequestError
    from streamflow.stages.imaging import decode_rgb
    from tests.properties.strategies import CLAIMS, check_refusal, claiming, other_files
    from tests.properties.strategies import pictures as good_files

MAX_PIXELS = 100_000
SIZE = (16, 8)


def target(data: bytes) -> None:
    for mode in ("RGB", "L"):
        try:
            picture = pictures.read("init_image", data, mode, max_pixels=MAX_PIXELS)  # type: ignore[arg-type]
        except InvalidRequestError as refusal:
            check_refusal(refusal, "init_image")
        else:
            assert picture.mode == mode
            assert 0 < picture.width * picture.height <= MAX_PIXELS
    try:
        made = prepare(data, data, width=SIZE[0], height=SIZE[1], max_pixels=MAX_PIXELS)
    except InvalidRequestError:
        return
    assert decode_rgb(made.init, size=SIZE).shape == (8, 16, 3)


def seeds() -> Iterator[bytes]:
    yield from good_files().values()
    yield from other_files()
    for kind in CLAIMS:
        yield claiming(kind, 200, 300)
        yield claiming(kind, 16383, 16383)


if __name__ == "__main__":
    run(target, seeds())
