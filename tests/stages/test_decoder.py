"""The decoder stage on a real, small checkpoint."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.imaging import decode_rgb
from streamflow.types import DecoderKind, ImageFormat, OutputSpec

TINY, FULL = DecoderKind.TINY, DecoderKind.FULL


@pytest.fixture(scope="module")
def stage(sd_checkpoint: Path) -> Iterator[DecoderStage]:
    stage = DecoderStage.load(sd_checkpoint, device="cpu")
    yield stage
    stage.close()


class Watched:
    """One of the stage's own autoencoders, with the rows of its calls written down."""

    def __init__(self, stage: DecoderStage, kind: DecoderKind) -> None:
        self._inner = stage._decoders[kind]
        self.rows: list[int] = []

    def decode(self, latents: np.ndarray) -> np.ndarray:
        self.rows.append(len(latents))
        return self._inner.decode(latents)


def watched(stage: DecoderStage, **options: object) -> tuple[DecoderStage, dict[DecoderKind, Watched]]:
    decoders = {kind: Watched(stage, kind) for kind in (TINY, FULL)}
    return DecoderStage(decoders, stage.card, **options), decoders  # type: ignore[arg-type]


def latents(seed: int, *, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, height, width), np.float32)


def test_decoders_differ_and_give_pixels_of_the_right_size(stage: DecoderStage) -> None:
    batch = np.stack([latents(1, width=8), latents(2, width=8)])
    tiny, full = stage.decode(batch, TINY), stage.decode(batch, FULL)
    assert tiny.shape == full.shape == (2, 64, 32, 3)
    assert tiny.dtype == np.uint8
    assert not np.array_equal(tiny, full)


async def test_equal_sizes_share_a_call_and_others_do_not(stage: DecoderStage) -> None:
    counted, decoders = watched(stage, max_rows=2, max_wait_s=60.0)
    raw = {kind: OutputSpec(format=ImageFormat.RAW, decoder=kind) for kind in (TINY, FULL)}
    work = [(latents(1), TINY), (latents(2, width=8), TINY), (latents(3), FULL), (latents(4), TINY)]
    work += [(latents(5, width=8), TINY), (latents(6), FULL)]
    async with counted:
        files = await asyncio.gather(*(counted.submit(x, raw[kind]) for x, kind in work))
    assert (decoders[TINY].rows, decoders[FULL].rows) == ([2, 2], [2])
    for file, (x, kind) in zip(files, work, strict=True):
        pixels = np.frombuffer(file, np.uint8).reshape(64, -1, 3).astype(int)
        assert np.abs(pixels - stage.decode(x[None], kind)[0]).max() <= 1


async def test_deterministic_mode_decodes_one_image_a_call(stage: DecoderStage) -> None:
    counted, decoders = watched(stage, deterministic=True)
    async with counted:
        files = await asyncio.gather(*(counted.submit(latents(seed), OutputSpec()) for seed in range(3)))
    pixels = counted.decode(np.stack([latents(seed) for seed in range(3)]), TINY)
    assert decoders[TINY].rows == [1] * 6
    assert all(np.array_equal(decode_rgb(f, size=(64, 64)), p) for f, p in zip(files, pixels, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_latents_that_are_not_finite_fail_alone(stage: DecoderStage, value: float) -> None:
    counted, decoders = watched(stage, max_rows=2, max_wait_s=60.0)
    spoilt = latents(1)
    spoilt[2, 3, 4] = value
    async with counted:
        first, bad, second = await asyncio.gather(
            *(counted.submit(x, OutputSpec()) for x in (latents(2), spoilt, latents(3))), return_exceptions=True
        )
    assert isinstance(first, bytes)
    assert isinstance(second, bytes)
    assert isinstance(bad, GenerationError)
    assert "not finite" in str(bad)
    assert decoders[TINY].rows == [2]
    with pytest.raises(GenerationError, match="not finite"):
        stage.decode(spoilt[None], TINY)


@pytest.mark.parametrize(
    "bad",
    [
        latents(1).astype(np.float16),
        latents(1)[:3],
        latents(1)[0],
        latents(1)[None],
        np.zeros((4, 0, 16), np.float32),
        np.zeros((4, 16, 65), np.float32),
    ],
    ids=["type", "channels", "flat", "batch", "empty", "too wide"],
)
async def test_other_shapes_and_types_are_refused(stage: DecoderStage, bad: np.ndarray) -> None:
    with pytest.raises(InvalidRequestError, match="latents: got"):
        await stage.submit(bad, OutputSpec())


async def test_a_decoder_that_is_not_there_is_refused(stage: DecoderStage) -> None:
    async with DecoderStage({FULL: stage._decoders[FULL]}, stage.card) as poor:
        with pytest.raises(InvalidRequestError, match="decoder: got 'tiny'; allowed: full"):
            await poor.submit(latents(1), OutputSpec(decoder=TINY))


async def test_files_carry_metadata_only_when_asked_and_previews_are_small_jpegs(stage: DecoderStage) -> None:
    async with DecoderStage(stage._decoders, stage.card) as own:
        plain = await own.submit(latents(1), OutputSpec(), metadata={"seed": 1})
        marked = await own.submit(latents(1), OutputSpec(embed_metadata=True), metadata={"seed": 1})
        preview = Image.open(io.BytesIO(await own.preview(latents(1))))
    assert "streamflow" not in Image.open(io.BytesIO(plain)).info
    assert json.loads(Image.open(io.BytesIO(marked)).info["streamflow"]) == {"seed": 1}
    assert (preview.format, preview.size) == ("JPEG", (64, 64))
