"""The encoder stage: prompts, init images and masks to tensors."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from streamflow.errors import GenerationError, InvalidRequestError, shorten
from streamflow.flow.programs import Role
from streamflow.stages.microbatch import MicroBatcher
from streamflow.types import AdapterUse, EncodedJob, EncodeJob, ModelCard, Tensors, Variant
from streamflow.validation import check_variant

if TYPE_CHECKING:
    from streamflow.families import Source
    from streamflow.families.base import TextEncoder, VaeEncoder

DEFAULT_SLOTS = 16

CACHE_VERSION = 1
"""Raised when what a prompt becomes changes, so that old cached values are not found."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedText:
    """One prompt's named arrays without a batch axis, and what of it did not fit ("" when all of it did)."""

    conditioning: Tensors
    truncated: str = ""


def prompt_cache_key(model_revision: str, prompt: str, adapters: Sequence[AdapterUse] = ()) -> str:
    """The content hash under which a prompt's tensors are kept: 64 hex digits.

    Args:
        adapters: those that change what prompts become.
    """
    uses = [(use.name, use.weight) for use in adapters]
    parts = json.dumps([CACHE_VERSION, model_revision, prompt, *([uses] if uses else [])])
    return hashlib.sha256(parts.encode()).hexdigest()


_FIELDS = {Role.TARGET: "prompt", Role.NEGATIVE: "negative_prompt", Role.SOURCE: "source_prompt"}


def truncation_warning(role: Role, truncated: str, max_tokens: int) -> str:
    """What the user reads when a prompt was cut."""
    return f"the {_FIELDS[role]} is longer than {max_tokens} tokens; this was left out: {shorten(truncated, 200)}"


class EncoderStage:
    """Encodes jobs; safe to share between tasks. Enter its context to use `encode_text` and `encode_image`.

    Args:
        text, images: the networks.
        card: of the checkpoint that they come from.
        max_rows: prompts, or images, in one network call.
        max_wait_s: how long an item waits for company.
        deterministic: one row per call, so that a result does not depend on its neighbours.
        slots: images that a service works on at once.
    """

    def __init__(
        self,
        text: TextEncoder,
        images: VaeEncoder,
        card: ModelCard,
        *,
        max_rows: int = 8,
        max_wait_s: float = 0.004,
        deterministic: bool = False,
        slots: int = DEFAULT_SLOTS,
    ) -> None:
        self.card, self.slots = card, slots
        self._text, self._images = text, images
        self._max_rows = 1 if deterministic else max_rows
        self._batcher: MicroBatcher[_Text | np.ndarray, EncodedText | np.ndarray] = MicroBatcher(
            self._run, key=_kind, max_rows=self._max_rows, max_wait_s=max_wait_s, name="encoder"
        )

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        engines: Path | None = None,
        make_engines: bool = False,
        threads: int = 0,
        max_wait_s: float = 0.004,
        deterministic: bool = False,
        slots: int = DEFAULT_SLOTS,
        name: str = "",
    ) -> Self:
        """Loads the text encoder and the VAE of a checkpoint, and nothing else of it.

        Args:
            backend, engines, threads, make_engines: see streamflow.backends.select.open_parts.
            name: that clients use, where the source is a folder; empty = the folder's name.
        """
        from streamflow.backends.select import AUTO, TORCH, open_parts
        from streamflow.families import describe, load_text_encoder, load_vae_encoder
        from streamflow.families.checkpoint import Checkpoint
        from streamflow.families.variants import check_backend

        checkpoint = Checkpoint.of(source, name)
        check_backend("adapters", checkpoint.adapters, backend, allowed=(AUTO, TORCH))
        open_part = open_parts(
            device,
            dtype,
            backend=TORCH if checkpoint.adapters else backend,
            engines=engines,
            threads=threads,
            make_engines=make_engines,
            measured=not deterministic,
        )
        text = load_text_encoder(checkpoint, open_part)
        images = load_vae_encoder(checkpoint, open_part)
        card = describe(checkpoint)
        return cls(text, images, card, max_wait_s=max_wait_s, deterministic=deterministic, slots=slots)

    cost = None
    row_counts: tuple[int, ...] = ()
    work = ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Finishes what waits and ends the stage's thread; blocks until then, for some seconds at most."""
        self._batcher.close()

    async def watch(self, *, hung_after_s: float = inf) -> None:
        """Returns never. Raises UnavailableError when a network call hangs: only a new process helps then."""
        await self._batcher.watch(hung_after_s=hung_after_s)

    def relevant(self, adapters: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
        """Those of the adapters that change what prompts become."""
        return self._text.relevant(adapters)

    @property
    def max_tokens(self) -> int:
        return self._text.max_tokens

    @property
    def backend(self) -> str:
        # Labels need no network.
        return ", ".join(dict.fromkeys(filter(None, (self._text.backend, self._images.backend))))

    @property
    def counters(self) -> dict[str, int]:
        """Network calls, and what went through them."""
        return {"calls_total": self._batcher.calls, "rows_total": self._batcher.rows}

    def warm_up(self) -> None:
        """Runs the networks once, on an empty prompt and a black picture of the default size."""
        blank = np.zeros((self.card.default_height, self.card.default_width, 3), np.uint8)
        self.encode([EncodeJob({Role.TARGET: ""}, init_image=blank)])

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodedJob]:
        """Encodes jobs in the calling thread; equal prompts are encoded once.

        Raises:
            InvalidRequestError: an image or a mask of a shape that the model does not take.
            GenerationError: a network gave values that are not finite.
        """
        encoded: dict[_Text, EncodedText] = {}
        for adapters in dict.fromkeys(self.relevant(job.adapters) for job in jobs):
            mine = [job for job in jobs if self.relevant(job.adapters) == adapters]
            texts = list(dict.fromkeys(text for job in mine for text in job.texts.values()))
            for start in range(0, len(texts), self._max_rows):
                chunk = texts[start : start + self._max_rows]
                found = self._encode_texts(chunk, adapters)
                encoded |= {_Text(text, adapters): one for text, one in zip(chunk, found, strict=True)}
        # By identity: the jobs of one request share one picture.
        pictures = {id(job.init_image): job.init_image for job in jobs if job.init_image is not None}
        latents = {key: self._encode_images([self._checked(picture)])[0] for key, picture in pictures.items()}
        return [self._result(job, encoded, latents.get(id(job.init_image))) for job in jobs]

    async def encode_text(self, prompt: str, adapters: Sequence[AdapterUse] = ()) -> EncodedText:
        """One prompt's conditioning. Raises InvalidRequestError for adapters that there are not."""
        check_variant(self.card, Variant(tuple(adapters)))
        result = await self._batcher.submit(_Text(prompt, self.relevant(adapters)))
        assert isinstance(result, EncodedText)
        return result

    async def encode_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to scaled latents, float32 [C, H / f, W / f]."""
        result = await self._batcher.submit(self._checked(image))
        assert isinstance(result, np.ndarray)
        return result

    def mask_latents(self, mask: np.ndarray) -> np.ndarray:
        """uint8 [H, W] to float32 [H / f, W / f] in [0, 1]: the mean over each latent's pixels."""
        self._check_shape("mask_image", mask, ndim=2)
        factor = self.card.latent_factor
        height, width = mask.shape
        blocks = mask.reshape(height // factor, factor, width // factor, factor).astype(np.float32)
        return np.asarray(blocks.mean(axis=(1, 3)) / 255.0)

    def _run(self, items: Sequence[_Text | np.ndarray]) -> Sequence[EncodedText | np.ndarray]:
        """One call of the batcher: its key keeps prompts, by their adapters, and images apart."""
        texts = [item for item in items if isinstance(item, _Text)]
        if not texts:
            return self._encode_images([item for item in items if isinstance(item, np.ndarray)])
        unique = list(dict.fromkeys(item.prompt for item in texts))
        encoded = dict(zip(unique, self._encode_texts(unique, texts[0].adapters), strict=True))
        return [encoded[item.prompt] for item in texts]

    def _encode_texts(self, texts: Sequence[str], adapters: Sequence[AdapterUse]) -> list[EncodedText]:
        encoded = self._text.encode(texts, adapters)
        for tensors in encoded:
            _check_finite(tensors.values(), "the text encoder")
        return [EncodedText(tensors, self._text.truncated(text)) for text, tensors in zip(texts, encoded, strict=True)]

    def _encode_images(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        pixels = np.stack(images).astype(np.float32) / 127.5 - 1.0
        latents = self._images.encode(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        _check_finite([latents], "the VAE encoder")
        return list(latents)

    def _checked(self, image: np.ndarray) -> np.ndarray:
        self._check_shape("init_image", image, ndim=3)
        return image

    def _check_shape(self, field: str, image: np.ndarray, *, ndim: int) -> None:
        card = self.card
        multiple = card.size_multiple
        fits = image.ndim == ndim and image.dtype == np.uint8 and image.shape[2:] == (3,) * (ndim - 2)
        if fits and all(multiple <= size and size % multiple == 0 for size in image.shape[:2]):
            return
        allowed = f"uint8 [height, width{', 3' if ndim == 3 else ''}], height and width multiples of {multiple}"
        raise InvalidRequestError(field, f"{image.dtype} {list(image.shape)}", allowed)

    def _result(self, job: EncodeJob, encoded: Mapping[_Text, EncodedText], source: np.ndarray | None) -> EncodedJob:
        adapters = self.relevant(job.adapters)
        texts = {role: encoded[_Text(text, adapters)] for role, text in job.texts.items()}
        return EncodedJob(
            conditioning={role: text.conditioning for role, text in texts.items()},
            init_latents=source,
            mask=None if job.mask is None else self.mask_latents(job.mask),
            warnings=tuple(
                truncation_warning(role, text.truncated, self.max_tokens)
                for role, text in texts.items()
                if text.truncated
            ),
        )


@dataclass(frozen=True, slots=True)
class _Text:
    """Attributes: adapters: those that change what it becomes."""

    prompt: str
    adapters: tuple[AdapterUse, ...] = ()


def _kind(item: _Text | np.ndarray) -> Hashable:
    return item.adapters if isinstance(item, _Text) else item.shape


def _check_finite(arrays: object, network: str) -> None:
    if not all(np.isfinite(array).all() for array in arrays):  # type: ignore[attr-defined]
        raise GenerationError(f"{network} gave values that are not finite; float32 (--dtype) may help", stage="encoder")
