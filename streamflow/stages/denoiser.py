"""The denoiser: from a job to latents, in the running batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import numpy as np
import torch

from streamflow.backends.runtime import DETERMINISTIC_ROWS, resolve_device, resolve_dtype
from streamflow.batching.engine import Engine, Progress
from streamflow.batching.slots import Image
from streamflow.errors import InvalidRequestError
from streamflow.families import load_denoiser
from streamflow.families.base import Denoiser
from streamflow.flow.noise import initial_noise
from streamflow.flow.samplers import SamplerRequest, compile_sampler
from streamflow.stages.runner import EngineRunner, TickRecord
from streamflow.types import DenoiseJob, ModelCard, Tensors

DEFAULT_SLOTS = 16

OnProgress = Callable[[int, int], None]
"""Called with (step, steps) after each network evaluation."""

OnPreview = Callable[[int, np.ndarray], None]
"""Called with (step, latents float32 [C, H, W] of what the image is becoming)."""


class DenoiserStage:
    """Denoises jobs, any mix at once.

    `run` serves a script, in the caller's thread; `denoise` serves asyncio, once the stage was entered as an async
    context manager. Use one of the two.

    Args:
        denoiser: networks and flow of the checkpoint.
        slots: images at once.
    """

    def __init__(self, denoiser: Denoiser, *, slots: int = DEFAULT_SLOTS, device: torch.device | str = "cpu") -> None:
        self._denoiser = denoiser
        self._engine = Engine(denoiser.networks, capacity=slots, device=device)
        self._handles: Iterator[int] = itertools.count()
        self._runner: EngineRunner | None = None
        self._stack = AsyncExitStack()

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        slots: int = DEFAULT_SLOTS,
        deterministic: bool = False,
        name: str = "",
    ) -> Self:
        """Loads the denoising networks of a checkpoint, and nothing else of it.

        Args:
            deterministic: every network call has one row count, so a picture's bytes do not depend on its neighbours.
            name: that clients use; empty = the folder's name.
        """
        where = resolve_device(device)
        rows = (DETERMINISTIC_ROWS,) if deterministic else None
        denoiser = load_denoiser(path, device=where, dtype=resolve_dtype(dtype, where), name=name, row_counts=rows)
        return cls(denoiser, slots=slots, device=where)

    @property
    def card(self) -> ModelCard:
        return self._denoiser.card

    @property
    def backend(self) -> str:
        return self._denoiser.networks["base"].name

    @property
    def slots(self) -> int:
        return self._engine.capacity

    @property
    def slots_in_use(self) -> int:
        return self._runner.in_use if self._runner else len(self._engine)

    @property
    def free_slots(self) -> int:
        return max(0, self.slots - self.slots_in_use)

    @property
    def counters(self) -> dict[str, int]:
        """Monotonic counts, such as ticks_total; see EngineRunner."""
        return dict(self._runner.counters) if self._runner else {}

    @property
    def ticks(self) -> Sequence[TickRecord]:
        """The last ticks, newest last."""
        return tuple(self._runner.ticks) if self._runner else ()

    def warm_up(self) -> None:
        """Runs one small job, so that the first request does not pay for what is made on first use."""
        card = self.card
        shapes = self._denoiser.conditioning_shapes
        blank: Tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        height, width = card.default_height, card.default_width
        self.run([DenoiseJob(blank, 1, 2.0, card.default_sampler, 0, height, width, negative=blank)])

    def run(
        self, jobs: Sequence[DenoiseJob], *, on_progress: Callable[[Progress], None] | None = None
    ) -> list[np.ndarray]:
        """Runs the jobs to their end in this thread.

        Args:
            on_progress: called after every step; `progress.handle` is the job's position.

        Returns:
            Final latents per job, float32 [C, H, W].

        Raises:
            InvalidRequestError: a job cannot be run.
            GenerationError: of the first image that failed.
        """
        waiting = [self.image(job, handle=position) for position, job in enumerate(jobs)]
        finished: dict[Hashable, np.ndarray] = {}
        try:
            while len(finished) < len(jobs):
                while waiting and self._engine.free:
                    self._engine.admit(waiting.pop(0))
                report = self._engine.tick()
                if on_progress is not None:
                    for progress in report.progress:
                        on_progress(progress)
                for error in report.failed.values():
                    raise error
                finished |= report.retired
        finally:
            for position in range(len(jobs)):
                self._engine.cancel(position)
        return [finished[position] for position in range(len(jobs))]

    async def __aenter__(self) -> Self:
        self._runner = await self._stack.enter_async_context(EngineRunner(self._engine))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def watch(self) -> None:
        """Returns never. Raises UnavailableError when the engine has ended: only a new process helps then."""
        if self._runner is None:
            raise RuntimeError("enter the stage first: async with DenoiserStage(...) as stage")
        await self._runner.watch()

    async def denoise(
        self, job: DenoiseJob, *, on_progress: OnProgress | None = None, on_preview: OnPreview | None = None
    ) -> np.ndarray:
        """Runs one job in the batch; cancelling the caller frees its slot before the next tick.

        Returns:
            Final latents, float32 [C, H, W].

        Raises:
            InvalidRequestError: the job cannot be run.
            GenerationError: the network failed or the latents are not finite.
        """
        if self._runner is None:
            raise RuntimeError("enter the stage first: async with DenoiserStage(...) as stage")
        progress = (lambda event: on_progress(event.step, event.steps)) if on_progress else None
        preview = (lambda event: on_preview(event.step, event.latents)) if on_preview else None
        image = self.image(job, handle=next(self._handles))
        return await self._runner.run(image, on_progress=progress, on_preview=preview)

    def image(self, job: DenoiseJob, *, handle: Hashable) -> Image:
        """Compiles the job's sampler and checks its arrays. Raises InvalidRequestError."""
        shape = self._denoiser.latent_shape(job.height, job.width)
        strength = job.strength if job.init_latents is not None else None
        program = compile_sampler(
            job.sampler, SamplerRequest(job.steps, job.guidance_scale, strength), self._denoiser.flow
        )
        if job.mask is not None and job.init_latents is None:
            raise InvalidRequestError("mask", "a mask without init latents", "a mask together with an init image")
        noise = initial_noise(job.seed, shape) if job.noise is None else _tensor("noise", job.noise, shape)
        return Image(
            handle=handle,
            program=program,
            noise=noise,
            conditioning=self._conditioning("conditioning", job.conditioning),
            unconditional=self._unconditional(job),
            source=None if job.init_latents is None else _tensor("init_latents", job.init_latents, shape),
            mask=None if job.mask is None else _tensor("mask", job.mask, shape[1:]),
            seed=job.seed,
            preview_interval=job.preview_interval_steps,
        )

    def _unconditional(self, job: DenoiseJob) -> dict[str, torch.Tensor] | None:
        if job.guidance_scale <= 1:
            return None
        if job.negative is None:
            raise InvalidRequestError("guidance_scale", job.guidance_scale, "at most 1 without a negative conditioning")
        return self._conditioning("negative", job.negative)

    def _conditioning(self, field: str, tensors: Tensors) -> dict[str, torch.Tensor]:
        shapes = self._denoiser.conditioning_shapes
        if set(tensors) != set(shapes):
            raise InvalidRequestError(field, sorted(tensors), "the tensors " + ", ".join(shapes))
        return {name: _tensor(f"{field}.{name}", tensors[name], shape) for name, shape in shapes.items()}


def _tensor(field: str, array: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    if array.shape != shape:
        raise InvalidRequestError(field, f"shape {list(array.shape)}", f"shape {list(shape)}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
