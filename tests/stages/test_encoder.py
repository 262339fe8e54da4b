"""The encoder stage on a real, small checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.flow.programs import Role
from streamflow.stages.encoder import EncoderStage, prompt_cache_key
from streamflow.types import AdapterUse, EncodeJob, Tensors

PICTURE = np.stack(np.broadcast_arrays(np.arange(64)[None, :] * 3, np.arange(64)[:, None] * 3, 90), -1).astype(np.uint8)


@pytest.fixture(scope="module")
def stage(sd_checkpoint: Path) -> Iterator[EncoderStage]:
    stage = EncoderStage.load(sd_checkpoint, device="cpu")
    yield stage
    stage.close()


class Watched:
    """The stage's own text encoder, with its calls written down; it breaks, or gives NaN, for chosen prompts."""

    def __init__(self, stage: EncoderStage) -> None:
        self._inner = stage._text
        self.max_tokens = self._inner.max_tokens
        self.calls: list[list[str]] = []

    def encode(self, prompts: Sequence[str], adapters: Sequence[AdapterUse] = ()) -> list[Tensors]:
        self.calls.append(list(prompts))
        if "break" in prompts:
            raise ArithmeticError("the network broke")
        spoil = [np.float32(np.nan if prompt == "nan" else 1) for prompt in prompts]
        encoded = self._inner.encode(prompts)
        return [
            {name: array * factor for name, array in tensors.items()}
            for tensors, factor in zip(encoded, spoil, strict=True)
        ]

    def relevant(self, adapters: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
        return self._inner.relevant(adapters)

    def truncated(self, prompt: str) -> str:
        return self._inner.truncated(prompt)


def watched(stage: EncoderStage, **options: object) -> tuple[EncoderStage, Watched]:
    text = Watched(stage)
    return EncoderStage(text, stage._images, stage.card, **options), text  # type: ignore[arg-type]


def texts(prompt: str, negative: str | None = None, **more: np.ndarray) -> EncodeJob:
    return EncodeJob({Role.TARGET: prompt} | ({} if negative is None else {Role.NEGATIVE: negative}), **more)


def test_equal_prompts_are_encoded_once_and_everybody_gets_theirs(stage: EncoderStage) -> None:
    counted, text = watched(stage)
    jobs = [texts("a", "b"), texts("a"), texts("b")]
    first, second, third = (job.conditioning for job in counted.encode(jobs))
    assert text.calls == [["a", "b"]]
    assert np.array_equal(first[Role.TARGET]["prompt_embeds"], second[Role.TARGET]["prompt_embeds"])
    assert np.array_equal(first[Role.NEGATIVE]["prompt_embeds"], third[Role.TARGET]["prompt_embeds"])
    assert not np.array_equal(first[Role.TARGET]["prompt_embeds"], third[Role.TARGET]["prompt_embeds"])
    assert second.keys() == {Role.TARGET}


def test_a_long_prompt_is_cut_and_the_warning_says_what_was(stage: EncoderStage) -> None:
    [fits, long] = stage.encode([texts("a red"), texts("abcdefghij tail", "abcdefghij end")])
    assert fits.warnings == ()
    assert len(long.warnings) == 2
    assert long.warnings[0].startswith("the prompt is longer than 12 tokens")
    assert "tail" in long.warnings[0].replace(" ", "")
    assert long.warnings[1].startswith("the negative_prompt is longer")


async def test_concurrent_prompts_share_calls_and_equal_what_they_give_alone(stage: EncoderStage) -> None:
    counted, text = watched(stage, max_rows=4, max_wait_s=60.0)
    async with counted:
        together = await asyncio.gather(*map(counted.encode_text, ("x", "no", "y", "no")))
    assert text.calls == [["x", "no", "y"]]
    for prompt, result in zip(("x", "no", "y", "no"), together, strict=True):
        [alone] = stage.encode([texts(prompt)])
        expected = alone.conditioning[Role.TARGET]["prompt_embeds"]
        np.testing.assert_allclose(result.conditioning["prompt_embeds"], expected, atol=1e-5)


async def test_in_deterministic_mode_every_call_has_one_row(stage: EncoderStage) -> None:
    counted, text = watched(stage, deterministic=True)
    async with counted:
        results = await asyncio.gather(*map(counted.encode_text, "xyz"))
    again = counted.encode([texts(prompt) for prompt in "zyx"])
    assert sorted(text.calls) == [["x"], ["x"], ["y"], ["y"], ["z"], ["z"]]
    for result, same in zip(results, reversed(again), strict=True):
        expected = same.conditioning[Role.TARGET]["prompt_embeds"]
        assert result.conditioning["prompt_embeds"].tobytes() == expected.tobytes()


async def test_only_the_guilty_prompt_fails(stage: EncoderStage) -> None:
    guarded, _ = watched(stage, max_rows=3, max_wait_s=60.0)
    async with guarded:
        good, broken, nan = await asyncio.gather(
            *map(guarded.encode_text, ("fine", "break", "nan")), return_exceptions=True
        )
    assert not isinstance(good, BaseException)
    assert np.isfinite(good.conditioning["prompt_embeds"]).all()
    assert isinstance(broken, ArithmeticError)
    assert isinstance(nan, GenerationError)
    assert nan.stage == "encoder"


async def test_init_image_becomes_the_vae_encoders_mode(stage: EncoderStage) -> None:
    async with EncoderStage(stage._text, stage._images, stage.card) as own:
        latents = await own.encode_image(PICTURE)
    assert latents.shape == (4, 16, 16)
    scaled = PICTURE.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(latents, stage._images.encode(scaled)[0], atol=1e-5)
    [alone] = stage.encode([texts("a", init_image=PICTURE)])
    assert alone.init_latents is not None
    np.testing.assert_allclose(latents, alone.init_latents, atol=1e-5)


def test_mask_is_averaged_over_the_pixels_of_each_latent(stage: EncoderStage) -> None:
    mask = np.zeros((64, 32), np.uint8)
    mask[:4, :8] = 255
    mask[4:6, :4] = 255
    small = stage.mask_latents(mask)
    assert small.shape == (16, 8)
    assert small.dtype == np.float32
    expected = np.zeros((16, 8), np.float32)
    expected[0, :2], expected[1, 0] = 1.0, 0.5
    assert np.array_equal(small, expected)


@pytest.mark.parametrize("picture", [PICTURE[:63], PICTURE[..., 0], PICTURE.astype(np.float32), PICTURE[:0]])
async def test_pictures_that_do_not_fit_are_refused(stage: EncoderStage, picture: np.ndarray) -> None:
    with pytest.raises(InvalidRequestError, match="init_image: got"):
        stage.encode([texts("a", init_image=picture)])
    with pytest.raises(InvalidRequestError, match="init_image: got"):
        await stage.encode_image(picture)


def test_cache_key_depends_on_the_model_and_the_text_and_not_on_where_one_ends() -> None:
    keys = {prompt_cache_key(*parts) for parts in [("r1", "a"), ("r2", "a"), ("r1", "b"), ("r", "1a"), ("r1", "")]}
    assert len(keys) == 5
    assert all(len(key) == 64 for key in keys)
    assert prompt_cache_key("r1", "a") == prompt_cache_key("r1", "a")
