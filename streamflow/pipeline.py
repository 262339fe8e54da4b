"""The fused form: the three stages in one Python process, without Redis or gRPC."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
from PIL import Image

from streamflow.backends.runtime import set_threads
from streamflow.backends.select import leave_cores
from streamflow.batching.engine import Progress
from streamflow.config import EngineSettings
from streamflow.errors import InvalidRequestError
from streamflow.families import Source
from streamflow.families.source import open_checkpoint
from streamflow.flow.guidance import Guidance, GuidanceMode, read_interval
from streamflow.flow.noise import image_seed
from streamflow.flow.programs import Program
from streamflow.flow.samplers import sampler_steps
from streamflow.pictures import Picture, keep_unmasked, load_source
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.denoiser import DEFAULT_SLOTS, DenoiserStage
from streamflow.stages.encoder import EncoderStage
from streamflow.types import (
    AdapterUse,
    DecoderKind,
    DenoiseJob,
    EncodedJob,
    EncodeJob,
    ModelCard,
    Variant,
    adapter_uses,
)
from streamflow.validation import (
    check_control_image,
    check_count,
    check_prompt,
    check_sampling,
    check_seed,
    check_size,
    check_subjects,
    check_true_cfg_scale,
    check_variant,
    texts_for,
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
        path: Source,
        *,
        flow: str = "auto",
        adapters: Path | None = None,
        controls: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        decoder: Literal["tiny", "full"] | None = None,
        slots: int = DEFAULT_SLOTS,
        deterministic: bool = False,
        threads: int | None = None,
        backend: str = "auto",
        engines: Path | None = None,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            path: a folder in diffusers layout, a name on the Hugging Face hub (org/name[@revision]), or a Checkpoint.
            flow: what the weights were distilled to, where the checkpoint's scheduler does not tell: rectified,
                instaflow, 2rf or perflow.
            adapters, controls: folders of LoRA adapters and of ControlNets that calls may name.
            device: auto, cpu, cuda, cuda:1 ...
            dtype: auto, float32, float16 or bfloat16; auto is float32 on a CPU and float16 on a GPU.
            decoder: the distilled autoencoder or the checkpoint's own; None = the model's default.
            slots: images in the running batch at once.
            deterministic: equal bytes for equal requests, whatever else runs in the batch.
            threads: CPU threads of the networks; None = all cores, or one if deterministic. Torch's own in this process
                stay as they are with None, but are set to one where other runtimes run all networks.
            backend: auto, torch, onnxruntime or openvino; auto is the fastest for which there is an exported graph.
            engines: where `streamflow engine export` put the graphs; None = STREAMFLOW_ENGINES, or the user's cache.

        Raises:
            InvalidRequestError: the folder is no checkpoint that can be served, or a setting does not exist.
        """
        if isinstance(path, Path | str):
            path = open_checkpoint(path, flow=flow, adapters=adapters, controls=controls)
        if threads is not None or deterministic:
            set_threads(threads or 0, deterministic=deterministic)
        where = {
            "device": device,
            "dtype": dtype,
            "deterministic": deterministic,
            "backend": backend,
            "engines": engines or EngineSettings().engines,
            "threads": threads or int(deterministic),
        }
        denoiser = DenoiserStage.load(path, slots=slots, **where)  # type: ignore[arg-type]
        kind = _decoder_kind(denoiser.card, decoder)
        encoder = EncoderStage.load(path, **where)  # type: ignore[arg-type]
        pixels = DecoderStage.load(path, **where)  # type: ignore[arg-type]
        leave_cores(", ".join((encoder.backend, denoiser.backend, pixels.backend)))
        return cls(encoder, denoiser, pixels, decoder_kind=kind)

    @property
    def card(self) -> ModelCard:
        """Defaults and limits of the model."""
        return self._denoiser.card

    def __repr__(self) -> str:
        return f"Pipeline({self.card.name!r}, {self.card.family}, decoder={self._kind.value})"

    def __call__(
        self,
        prompt: str | Sequence[str] = (),
        *,
        class_labels: Sequence[int] = (),
        negative_prompt: str = "",
        source_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_mode: str = "full",
        residual_strength: float = 1.0,
        seed: int | None = None,
        num_images: int = 1,
        width: int | None = None,
        height: int | None = None,
        sampler: str | None = None,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        adapters: Mapping[str, float] | Sequence[str] = (),
        control: str = "",
        control_image: Picture | None = None,
        control_scale: float = 1.0,
        latents: np.ndarray | None = None,
        output: Literal["pil", "np", "latents"] = "pil",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> PipelineOutput:
        """Makes `num_images` pictures of each prompt; image k of the call uses `seed + k`.

        Args:
            class_labels: for models that take them in place of prompts.
            true_cfg_scale: guidance with the negative prompt, for models that are fed guidance_scale (FLUX).
            source_prompt: what `image` shows, for samplers that edit it.
            steps, guidance_scale, width, height, sampler: None = the model's default.
            guidance_interval: sigmas between which guidance acts, such as (0.9, 0.2); 1 = noise, 0 = data; None = all.
            guidance_mode: "full", "self-negative" or "onetime-negative"; the last two are experimental, and
                `residual_strength` in [0, 1] scales what they steer away from.
            seed: None = a random one, reported in the output.
            image, strength, mask: start from a picture; change it by strength in (0, 1] (default 0.8); only where the
                mask, a picture of the same size, is white. PIL images, or PNG, JPEG and WebP files as bytes or paths;
                a file has at most 4 megapixels.
            adapters: names of LoRA adapters, or a mapping from names to weights.
            control, control_image, control_scale: a ControlNet by its name, what it reads, and how strongly it acts.
            latents: the initial noise in place of the seed's, [n, C, H / f, W / f].
            on_progress: called after every step of every image.

        Raises:
            InvalidRequestError: a value that cannot be used; the message says which and what is allowed.
            GenerationError: a picture could not be made.
        """
        card = self.card
        width, height = width or card.default_width, height or card.default_height
        sampler = sampler or card.default_sampler
        scale = card.default_guidance_scale if guidance_scale is None else guidance_scale
        settings = _Settings(
            steps=sampler_steps(sampler, card.default_steps) if steps is None else steps,
            guidance=_guidance(card, scale, true_cfg_scale, guidance_interval, guidance_mode, residual_strength),
            sampler=sampler,
            seed=secrets.randbits(64) if seed is None else seed,
            width=width,
            height=height,
            strength=_strength(image, strength, mask),
            variant=Variant(_adapters(adapters), control),
            control_scale=control_scale,
        )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts_beside = {"negative_prompt": negative_prompt, "source_prompt": source_prompt}
        check_subjects(card, prompts, class_labels, most=MAX_IMAGES, **texts_beside)
        check_true_cfg_scale(card, true_cfg_scale, negative_prompt)
        check_variant(card, settings.variant)
        check_control_image(control, control_image is not None, control_scale)
        prompts = prompts or [str(label) for label in class_labels]
        _check(card, settings, prompts, negative_prompt, source_prompt, num_images)
        program = settings.check(card, has_image=image is not None)
        noise = _noise(latents, len(prompts) * num_images)

        clock = _Clock()
        source = None if image is None else load_source(image, mask, size=(width, height), names=("image", "mask"))
        more = {"negative_prompt": negative_prompt, "source_prompt": source_prompt, "sampler": settings.sampler}
        picture, kept = (None, None) if source is None else (source.image, source.mask)
        uses = settings.variant.adapters
        texts = [EncodeJob(texts_for(program, prompt=text, **more), picture, kept, uses) for text in prompts]
        steering = _control_pixels(control_image, (width, height))
        encoded = self._encoder.encode(texts)
        clock.lap("encode")
        owners = [job for job in encoded for _ in range(num_images)]
        seeds = [image_seed(settings.seed, k) for k in range(len(owners))]
        jobs = [settings.job(job, s, n, steering) for job, s, n in zip(owners, seeds, noise, strict=True)]
        final = np.stack(self._denoiser.run(jobs, on_progress=on_progress))
        clock.lap("denoise")
        images: list[Image.Image] | np.ndarray = []
        if output != "latents":
            decoded = self._decoder.decode(final, self._kind)
            if source is not None:
                decoded = np.stack([keep_unmasked(one, source) for one in decoded])
            images = decoded if output == "np" else [Image.fromarray(one) for one in decoded]
            clock.lap("decode")
        warnings = tuple(dict.fromkeys(warning for job in encoded for warning in (*job.warnings, *program.warnings)))
        return PipelineOutput(images, final, seeds, clock.laps, warnings)


@dataclass(frozen=True, slots=True)
class _Settings:
    steps: int
    guidance: Guidance
    sampler: str
    seed: int
    width: int
    height: int
    strength: float
    variant: Variant
    control_scale: float

    def check(self, card: ModelCard, *, has_image: bool) -> Program:
        return check_sampling(
            card,
            sampler=self.sampler,
            steps=self.steps,
            guidance=self.guidance,
            strength=self.strength if has_image else None,
            size_px=(self.width, self.height),
        )

    def job(
        self, encoded: EncodedJob, seed: int, noise: np.ndarray | None, control_image: np.ndarray | None
    ) -> DenoiseJob:
        return DenoiseJob(
            conditioning=encoded.conditioning,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            seed=seed,
            height=self.height,
            width=self.width,
            init_latents=encoded.init_latents,
            strength=self.strength,
            mask=encoded.mask,
            noise=noise,
            variant=self.variant,
            control_image=control_image,
            control_scale=self.control_scale,
        )


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = (now - self._last) * 1000, now


def _check(
    card: ModelCard,
    settings: _Settings,
    prompts: list[str],
    negative_prompt: str,
    source_prompt: str,
    num_images: int,
) -> None:
    for prompt in prompts:
        check_prompt("prompt", prompt, max_chars=MAX_PROMPT_CHARS)
    for name, text in (("negative_prompt", negative_prompt), ("source_prompt", source_prompt)):
        check_prompt(name, text, max_chars=MAX_PROMPT_CHARS, may_be_empty=True)
    check_count("num_images", num_images, MAX_IMAGES // len(prompts))
    check_seed(settings.seed)
    check_size(card, "width", settings.width)
    check_size(card, "height", settings.height)


def _guidance(
    card: ModelCard,
    scale: float,
    true_cfg_scale: float | None,
    interval: tuple[float, float] | None,
    mode: str,
    residual: float,
) -> Guidance:
    if mode not in list(GuidanceMode):
        raise InvalidRequestError("guidance_mode", mode, ", ".join(GuidanceMode))
    start, end = (1.0, 0.0) if interval is None else read_interval(interval)
    scale, embedded = card.guidance_scales(scale, true_cfg_scale)
    return Guidance(scale, start, end, GuidanceMode(mode), residual, embedded)


def _adapters(given: Mapping[str, float] | Sequence[str]) -> tuple[AdapterUse, ...]:
    if isinstance(given, Mapping):
        return adapter_uses(given.items())
    return adapter_uses((name, 1.0) for name in ([given] if isinstance(given, str) else given))


def _control_pixels(image: Picture | None, size: tuple[int, int]) -> np.ndarray | None:
    return None if image is None else load_source(image, size=size, names=("control_image", "")).image


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


def _noise(latents: np.ndarray | None, count: int) -> list[np.ndarray] | list[None]:
    if latents is None:
        return [None] * count
    if latents.ndim != 4 or len(latents) != count:
        raise InvalidRequestError(
            "latents", f"shape {list(latents.shape)}", f"[{count}, C, H / f, W / f]: one per image"
        )
    return list(latents)
