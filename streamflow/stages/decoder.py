"""The decoder stage: latents to pixels, and pixels to picture files."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.pictures import Source, keep_unmasked
from streamflow.stages.imaging import ImagePool
from streamflow.stages.microbatch import MicroBatcher
from streamflow.types import DecoderKind, ImageFormat, ModelCard, OutputSpec

if TYPE_CHECKING:
    from streamflow.families import Source as CheckpointSource
    from streamflow.families.base import LatentDecoder

DEFAULT_SLOTS = 8
PREVIEW_QUALITY = 80
MAX_ROWS = 4


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    latents: np.ndarray
    kind: DecoderKind


class DecoderStage:
    """Decodes latents; safe to share between tasks. Enter its context to use `submit` and `preview`.

    Args:
        decoders: the autoencoders by kind; at least one.
        card: of the checkpoint that they come from.
        max_rows: latents in one network call.
        max_wait_s: how long an item waits for company.
        image_workers: processes that encode picture files.
        deterministic: one image per call, so that its pixels do not depend on its neighbours.
        slots: images that a service works on at once.
    """

    def __init__(
        self,
        decoders: Mapping[DecoderKind, LatentDecoder],
        card: ModelCard,
        *,
        max_rows: int = MAX_ROWS,
        max_wait_s: float = 0.004,
        image_workers: int = 1,
        deterministic: bool = False,
        slots: int = DEFAULT_SLOTS,
    ) -> None:
        self.card, self.slots = card, slots
        self._decoders = decoders
        self._max_rows = 1 if deterministic else max_rows
        self._image_workers = image_workers
        self._pool: ImagePool | None = None
        self._batcher: MicroBatcher[_Item, np.ndarray] = MicroBatcher(
            self._run, key=_group, max_rows=self._max_rows, max_wait_s=max_wait_s, name="decoder"
        )

    @classmethod
    def load(
        cls,
        source: CheckpointSource,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        engines: Path | None = None,
        make_engines: bool = False,
        threads: int = 0,
        max_wait_s: float = 0.004,
        image_workers: int = 1,
        deterministic: bool = False,
        slots: int = DEFAULT_SLOTS,
        name: str = "",
    ) -> Self:
        """Loads every autoencoder that the checkpoint has, and nothing else of it.

        Args:
            backend, engines, threads, make_engines: see streamflow.backends.select.open_parts.
            name: that clients use, where the source is a folder; empty = the folder's name.
        """
        from streamflow.backends.select import open_parts
        from streamflow.families import describe, load_decoder
        from streamflow.families.checkpoint import Checkpoint

        checkpoint = Checkpoint.of(source, name)
        card = describe(checkpoint)
        open_part = open_parts(
            device,
            dtype,
            backend=backend,
            engines=engines,
            threads=threads,
            rows=MAX_ROWS,
            make_engines=make_engines,
            measured=not deterministic,
        )
        decoders = {kind: load_decoder(checkpoint, kind, open_part) for kind in card.decoders}
        return cls(
            decoders,
            card,
            max_wait_s=max_wait_s,
            image_workers=image_workers,
            deterministic=deterministic,
            slots=slots,
        )

    cost = None
    row_counts: tuple[int, ...] = ()
    work = ()

    async def __aenter__(self) -> Self:
        self._pool = await ImagePool(self._image_workers).__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)
        if self._pool is not None:
            await self._pool.__aexit__(*exc_info)

    def close(self) -> None:
        """Finishes what waits and ends the stage's thread; blocks until then, for some seconds at most."""
        self._batcher.close()

    async def watch(self, *, hung_after_s: float = inf) -> None:
        """Returns never. Raises UnavailableError when a network call hangs: only a new process helps then."""
        await self._batcher.watch(hung_after_s=hung_after_s)

    @property
    def backend(self) -> str:
        return ", ".join(dict.fromkeys(decoder.backend for decoder in self._decoders.values()))

    @property
    def counters(self) -> dict[str, int]:
        """Network calls, and what went through them."""
        return {"calls_total": self._batcher.calls, "rows_total": self._batcher.rows}

    def warm_up(self) -> None:
        """Runs each autoencoder once, on a picture of the default size."""
        card = self.card
        height, width = card.default_height // card.latent_factor, card.default_width // card.latent_factor
        for kind in self._decoders:
            self.decode(np.zeros((1, card.latent_channels, height, width), np.float32), kind)

    def decode(self, latents: np.ndarray, kind: DecoderKind) -> np.ndarray:
        """Decodes in the calling thread.

        Args:
            latents: scaled, float32 [n, C, h, w].

        Returns:
            uint8 [n, h * f, w * f, 3].

        Raises:
            InvalidRequestError: another shape or type, or a decoder that is not there.
            GenerationError: the latents are not finite.
        """
        for image in latents:
            self._check(image, kind)
        chunks = range(0, len(latents), self._max_rows)
        return np.concatenate(
            [self._decoders[kind].decode(latents[start : start + self._max_rows]) for start in chunks]
        )

    async def submit(
        self,
        latents: np.ndarray,
        output: OutputSpec,
        *,
        metadata: Mapping[str, object] | None = None,
        kept: Source | None = None,
    ) -> bytes:
        """One picture file, decoded in one call with others that are submitted about now.

        Args:
            latents: scaled, float32 [C, h, w].
            metadata: written into the file where `output.embed_metadata` asks for it.
            kept: a picture whose pixels outside its mask are put over the decoded ones.

        Raises:
            InvalidRequestError, GenerationError: see `decode`.
        """
        pixels = await self._pixels(latents, output.decoder)
        if kept is not None:
            pixels = keep_unmasked(pixels, kept)
        embedded = metadata if output.embed_metadata else None
        return await self._images.encode(pixels, output.format, quality=output.quality, metadata=embedded)

    async def preview(self, latents: np.ndarray) -> bytes:
        """A JPEG by the fastest decoder that is there."""
        kind = DecoderKind.TINY if DecoderKind.TINY in self._decoders else self.card.default_decoder
        pixels = await self._pixels(latents, kind)
        return await self._images.encode(pixels, ImageFormat.JPEG, quality=PREVIEW_QUALITY)

    @property
    def _images(self) -> ImagePool:
        if self._pool is None:
            raise RuntimeError("the stage's context has not been entered")
        return self._pool

    async def _pixels(self, latents: np.ndarray, kind: DecoderKind) -> np.ndarray:
        # Checked before it meets others: bad latents must not cost their neighbours a second call.
        self._check(latents, kind)
        return await self._batcher.submit(_Item(latents, kind))

    def _run(self, items: Sequence[_Item]) -> Sequence[np.ndarray]:
        return list(self._decoders[items[0].kind].decode(np.stack([item.latents for item in items])))

    def _check(self, latents: np.ndarray, kind: DecoderKind) -> None:
        if kind not in self._decoders:
            raise InvalidRequestError("decoder", kind.value, ", ".join(self._decoders))
        card = self.card
        fits = latents.ndim == 3 and latents.dtype == np.float32 and latents.shape[0] == card.latent_channels
        limits = (card.max_height // card.latent_factor, card.max_width // card.latent_factor)
        if not fits or not all(1 <= size <= most for size, most in zip(latents.shape[1:], limits, strict=True)):
            allowed = f"float32 [{card.latent_channels}, height, width], at most {limits[0]} x {limits[1]}"
            raise InvalidRequestError("latents", f"{latents.dtype} {list(latents.shape)}", allowed)
        if not np.isfinite(latents).all():
            raise GenerationError("the latents are not finite: they hold NaN or infinity", stage="decoder")


def _group(item: _Item) -> Hashable:
    return item.kind, item.latents.shape
