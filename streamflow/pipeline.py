"""The fused form: the three stages in one Python process, without Redis or gRPC."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
from PIL import Image

from streamflow.backends.runtime import set_threads
from streamflow.batching.engine import Progress
from streamflow.errors import InvalidRequestError
from streamflow.flow.noise import image_seed
from streamflow.pictures import Picture, load_source
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.denoiser import DEFAULT_SLOTS, DenoiserStage
from streamflow.stages.encoder import EncoderStage
from streamflow.types import DecoderKind, DenoiseJob, EncodedJob, EncodeJob, ModelCard
from streamflow.validation import (
    check_count,
    check_guidance_scale,
    check_prompt,
    check_sampler,
    check_seed,
    check_size,
    check_steps,
)

MAX_IMAGES = 1024
MAX_PROMPT_CHARS = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class PipelineOutput:
    """What a call made.

    Attributes:
        images: PIL images, or one uint8 array [n, H, W, 3] for output="np"; empty for output="latents".
        latents: final scaled latents, float32 [n, C, H / f, W / f].
        seeds: per image; the seed makes the image again, alone.
        timings: milliseconds by stage: encode, denoise, decode.
        warnings: sentences such as what was cut off a prompt.
    """

    images: list[Image.Image] | np.ndarray
    latents: np.ndarray
    seeds: list[int]
    timings: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Pipeline:
    """Text to image in one process.

    >>> pipeline = Pipeline.from_pretrained("models/shapes")
    >>> pipeline("a red circle on a white background", steps=4, seed=7).images[0].save("circle.png")

    Args:
        encoder, denoiser, decoder: the stages.
        decoder_kind: which autoencoder makes the pixels.
    """

    def __init__(
        self, encoder: EncoderStage, denoiser: DenoiserStage, decoder: DecoderStage, *, decoder_kind: DecoderKind
    ) -> None:
        self._encoder, self._denoiser, self._decoder, self._kind = encoder, denoiser, decoder, decoder_kind

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        decoder: Literal["tiny", "full"] | None = None,
        slots: int = DEFAULT_SLOTS,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> Self:
        """Loads a checkpoint folder in diffusers layout.

        Args:
            device: auto, cpu, cuda, cuda:1 ...
            dtype: auto, float32, float16 or bfloat16; auto is float32 on a CPU and float16 on a GPU.
            decoder: the distilled autoencoder or the checkpoint's own; None = the model's default.
            slots: images in the running batch at once.
            deterministic: equal bytes for equal requests, whatever else runs in the batch.
            threads: CPU threads of torch in this process; None leaves them as they are, or sets one if deterministic.

        Raises:
            InvalidRequestError: the folder is no checkpoint that can be served, or a setting does not exist.
        """
        if threads is not None or deterministic:
            set_threads(threads or 0, deterministic=deterministic)
        where = {"device": device, "dtype": dtype, "deterministic": deterministic}
        denoiser = DenoiserStage.load(path, slots=slots, **where)  # type: ignore[arg-type]
        kind = _decoder_kind(denoiser.card, decoder)
        return cls(
            EncoderStage.load(path, **where),  # type: ignore[arg-type]
            denoiser,
            DecoderStage.load(path, **where),  # type: ignore[arg-type]
            decoder_kind=kind,
        )

    @property
    def card(self) -> ModelCard:
        """Defaults and limits of the model."""
        return self._denoiser.card

    def __repr__(self) -> str:
        return f"Pipeline({self.card.name!r}, {self.card.family}, decoder={self._kind.value})"

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        num_images: int = 1,
        width: int | None = None,
        height: int | None = None,
        sampler: str | None = None,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        latents: np.ndarray | None = None,
        output: Literal["pil", "np", "latents"] = "pil",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> PipelineOutput:
        """Makes `num_images` pictures of each prompt; image k of the call uses `seed + k`.

        Args:
            steps, guidance_scale, width, height, sampler: None = the model's default.
            seed: None = a random one, reported in the output.
            image, strength, mask: start from a picture; change it by strength in (0, 1] (default 0.8); only where the
                mask, a picture of the same size, is white. PIL images, or PNG, JPEG and WebP files as bytes or paths;
                a file has at most 4 megapixels.
            latents: the initial noise in place of the seed's, [n, C, H / f, W / f].
            on_progress: called after every step of every image.

        Raises:
            InvalidRequestError: a value that cannot be used; the message says which and what is allowed.
            GenerationError: a picture could not be made.
        """
        card = self.card
        width, height = width or card.default_width, height or card.default_height
        settings = _Settings(
            steps=card.default_steps if steps is None else steps,
            guidance_scale=card.default_guidance_scale if guidance_scale is None else guidance_scale,
            sampler=sampler or card.default_sampler,
            seed=secrets.randbits(64) if seed is None else seed,
            width=width,
            height=height,
            strength=_strength(image, strength, mask),
        )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check(card, settings, prompts, negative_prompt, num_images)
        noise = _noise(latents, len(prompts) * num_images)

        clock = _Clock()
        pictures = _pictures(image, mask, (width, height))
        texts = [EncodeJob(text, negative_prompt, settings.guidance_scale > 1, *pictures) for text in prompts]
        encoded = self._encoder.encode(texts)
        clock.lap("encode")
        owners = [job for job in encoded for _ in range(num_images)]
        seeds = [image_seed(settings.seed, k) for k in range(len(owners))]
        jobs = [settings.job(job, s, n) for job, s, n in zip(owners, seeds, noise, strict=True)]
        final = np.stack(self._denoiser.run(jobs, on_progress=on_progress))
        clock.lap("denoise")
        images: list[Image.Image] | np.ndarray = []
        if output != "latents":
            pixels = self._decoder.decode(final, self._kind)
            images = pixels if output == "np" else [Image.fromarray(one) for one in pixels]
            clock.lap("decode")
        warnings = tuple(dict.fromkeys(warning for job in encoded for warning in job.warnings))
        return PipelineOutput(images, final, seeds, clock.laps, warnings)


@dataclass(frozen=True, slots=True)
class _Settings:
    steps: int
    guidance_scale: float
    sampler: str
    seed: int
    width: int
    height: int
    strength: float

    def job(self, encoded: EncodedJob, seed: int, noise: np.ndarray | None) -> DenoiseJob:
        return DenoiseJob(
            conditioning=encoded.conditioning,
            negative=encoded.negative,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            seed=seed,
            height=self.height,
            width=self.width,
            init_latents=encoded.init_latents,
            strength=self.strength,
            mask=encoded.mask,
            noise=noise,
        )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = (now - self._last) * 1000, now


def _check(card: ModelCard, settings: _Settings, prompts: list[str], negative_prompt: str, num_images: int) -> None:
    check_count("prompt", len(prompts), MAX_IMAGES)
    for prompt in prompts:
        check_prompt("prompt", prompt, max_chars=MAX_PROMPT_CHARS)
    check_prompt("negative_prompt", negative_prompt, max_chars=MAX_PROMPT_CHARS, may_be_empty=True)
    check_count("num_images", num_images, MAX_IMAGES // len(prompts))
    check_steps(card, settings.steps)
    check_guidance_scale(settings.guidance_scale)
    check_sampler(card, settings.sampler)
    check_seed(settings.seed)
    check_size(card, "width", settings.width)
    check_size(card, "height", settings.height)


def _decoder_kind(card: ModelCard, name: str | None) -> DecoderKind:
    if name is None:
        return card.default_decoder
    if name not in card.decoders:
        raise InvalidRequestError("decoder", name, ", ".join(card.decoders))
    return DecoderKind(name)


def _strength(image: Picture | None, strength: float | None, mask: Picture | None) -> float:
    if image is None and (strength is not None or mask is not None):
        field_name, given = ("strength", strength) if mask is None else ("mask", mask)
        raise InvalidRequestError(field_name, given, "only together with an image", "give image=")
    return 0.8 if strength is None else strength


def _pictures(
    image: Picture | None, mask: Picture | None, size: tuple[int, int]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if image is None:
        return None, None
    source = load_source(image, mask, size=size, names=("image", "mask"))
    return source.image, source.mask


def _noise(latents: np.ndarray | None, count: int) -> list[np.ndarray] | list[None]:
    if latents is None:
        return [None] * count
    if latents.ndim != 4 or len(latents) != count:
        raise InvalidRequestError(
            "latents", f"shape {list(latents.shape)}", f"[{count}, C, H / f, W / f]: one per image"
        )
    return list(latents)
