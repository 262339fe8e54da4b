"""The denoiser: from a job to latents, in the running batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Self

import numpy as np
import torch

from streamflow.backends.cost import Cost
from streamflow.backends.runtime import available_cores
from streamflow.backends.select import AUTO, TORCH, open_parts
from streamflow.batching.compiled import CompiledStep
from streamflow.batching.engine import Engine, Progress
from streamflow.batching.slots import Image
from streamflow.batching.step import StepFunction, run_step
from streamflow.errors import InvalidRequestError, NotFoundError
from streamflow.families import Source, load_denoiser
from streamflow.families.base import Denoiser
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.variants import Variants, check_backend, load_variants
from streamflow.flow.guidance import Guidance
from streamflow.flow.noise import initial_noise
from streamflow.flow.programs import BASE, Program, Role
from streamflow.flow.samplers import SamplerRequest, compile_sampler, parse_sampler, sampler_steps
from streamflow.stages.arrays import control_inputs, mask_tensor, tensor
from streamflow.stages.mixes import Mixes, fits
from streamflow.stages.runner import EngineRunner, TickRecord
from streamflow.stages.sizing import LEAST_SLOTS, MOST_SLOTS, choose_step, measured_cost, pad, pad_to_one
from streamflow.stages.timing import TimedStep
from streamflow.telemetry import get_logger
from streamflow.types import DenoiseJob, JobChange, ModelCard, SlotView, Tensors, Variant
from streamflow.validation import check_control_image, check_variant

DEFAULT_SLOTS = 16

_log = get_logger(__name__)

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
        step: how a group of slots makes a step.
        cost: of a call of the base network, where it was measured.
        variants: of the networks, for jobs that ask for adapters or a ControlNet; None = there are none.

    Attributes:
        on_tick: told of every tick; set before the stage is entered.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        slots: int = DEFAULT_SLOTS,
        device: torch.device | str = "cpu",
        step: StepFunction = run_step,
        cost: Cost | None = None,
        variants: Variants | None = None,
    ) -> None:
        self.cost = cost
        self._denoiser, self._step = denoiser, step
        self._timed = TimedStep(step)
        self._engine = Engine(denoiser.networks, variant_of=variants, capacity=slots, device=device, step=self._timed)
        self.on_tick: Callable[[TickRecord], None] | None = None
        self._handles: Iterator[int] = itertools.count()
        self._runner: EngineRunner | None = None
        self._changeable_jobs: dict[Hashable, tuple[Hashable, DenoiseJob]] = {}
        self._labels: dict[Hashable, tuple[str, str]] = {}
        self._stack = AsyncExitStack()
        self._variants, self._most_mixes = variants, variants.kept if variants else 0
        self._mixes = Mixes(self._most_mixes)

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
        slots: int = DEFAULT_SLOTS,
        deterministic: bool = False,
        compiled: bool = False,
        name: str = "",
    ) -> Self:
        """Loads the denoising networks of a checkpoint, and nothing else of it.

        Args:
            backend, engines, threads, make_engines: see streamflow.backends.select.open_parts; where `compiled` is
                asked for it is torch.
            slots: images at once; 0 = as many as its measured cost asks for.
            deterministic: a picture's bytes do not depend on its neighbours; every network call has one row count,
                unless they do not anyway.
            compiled: torch compiles a step for each of a few row counts; `warm_up` does those of the default size, and
                others are not compiled. On a GPU steps are CUDA graphs with it and without.
            name: that clients use, where the source is a folder; empty = the folder's name.
        """
        if compiled and backend not in (AUTO, TORCH):
            raise InvalidRequestError("backend", backend, f"{AUTO} or {TORCH}: torch is what compiles steps")
        checkpoint = Checkpoint.of(source, name)
        check_backend("adapters", checkpoint.adapters, backend, allowed=(AUTO, TORCH))
        check_backend("controls", checkpoint.controls, backend, allowed=(AUTO, TORCH))
        changed = [name for name in ("adapters", "controls") if getattr(checkpoint, name)]
        if changed:
            _log.info("backend", part="denoiser", backend=TORCH, why=f"graphs cannot take {' and '.join(changed)}")
        chosen = TORCH if compiled or changed else backend
        open_part = open_parts(
            device,
            dtype,
            backend=chosen,
            engines=engines,
            threads=threads,
            rows=2 * (slots or LEAST_SLOTS),
            make_engines=make_engines,
            measured=not deterministic,
        )
        denoiser = load_denoiser(checkpoint, open_part)
        cost = measured_cost(denoiser, open_part.device, open_part.dtype, threads=threads, engines=engines)
        slots = slots or cost.slots(least=LEAST_SLOTS, most=MOST_SLOTS)
        step = choose_step(denoiser, open_part.device, compiled=compiled)
        if deterministic:
            pad_to_one(denoiser, threads=threads or available_cores())
        elif step is not run_step:
            pad(denoiser, cost.buckets(2 * slots))
        forget = step.forget if isinstance(step, CompiledStep) else None
        variants = load_variants(checkpoint, denoiser, on_drop=forget)
        return cls(denoiser, slots=slots, device=open_part.device, step=step, cost=cost, variants=variants)

    @property
    def card(self) -> ModelCard:
        return self._denoiser.card

    @property
    def backend(self) -> str:
        return ", ".join(dict.fromkeys(network.name for network in self._denoiser.networks.values()))

    @property
    def engine(self) -> Engine:
        """The running batch, for who ticks it in place of `run` and `denoise`."""
        return self._engine

    @property
    def row_counts(self) -> tuple[int, ...]:
        """To which network calls are padded; empty = to none."""
        return self._denoiser.networks["base"].row_counts or ()

    @property
    def slots(self) -> int:
        return self._engine.capacity

    @property
    def slots_in_use(self) -> int:
        return self._runner.in_use if self._runner else len(self._engine)

    @property
    def counters(self) -> dict[str, int]:
        """Monotonic counts, such as ticks_total; see EngineRunner."""
        return dict(self._runner.counters) if self._runner else {}

    @property
    def waited_s(self) -> float:
        """How long its engine has been without work; for any thread. See EngineRunner."""
        return self._runner.waited_s if self._runner else 0.0

    @property
    def ticks(self) -> Sequence[TickRecord]:
        """The last ticks, newest last."""
        return tuple(self._runner.ticks) if self._runner else ()

    def warm_up(self) -> None:
        """Runs every row count that the networks are compiled for, so that no request pays for what is made then."""
        samplers = [self.card.default_sampler, *(["E1R1"] if self.card.flow.refiner else [])]
        counts = self._denoiser.networks[BASE].row_counts or (2,)
        for sampler, rows in itertools.product(samplers, counts):
            guided, alone = divmod(min(rows, 2 * self.slots), 2)
            self.run([self._blank(sampler, scale) for scale in [2.0] * guided + [1.0] * alone])
        if isinstance(self._step, CompiledStep):
            self._step.seal()

    def _blank(self, sampler: str, guidance_scale: float) -> DenoiseJob:
        card, shapes = self.card, self._denoiser.conditioning_shapes
        text: Tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        texts, guidance = dict.fromkeys(Role, text), Guidance(guidance_scale)
        height, width = card.default_height, card.default_width
        # One step is enough, but for a sampler that takes one in each of its windows.
        steps = sampler_steps(sampler, card.default_steps if parse_sampler(sampler).name == "perflow" else 1)
        return DenoiseJob(texts, steps, guidance, sampler, 0, height, width)

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
        under_way: dict[Hashable, Variant] = {}
        try:
            while len(finished) < len(jobs):
                self._admit(waiting, under_way)
                report = self._engine.tick()
                if on_progress is not None:
                    for progress in report.progress:
                        on_progress(progress)
                for error in report.failed.values():
                    raise error
                finished |= report.retired
                for position in report.retired:
                    del under_way[position]
        finally:
            for position in range(len(jobs)):
                self._engine.cancel(position)
        return [finished[position] for position in range(len(jobs))]

    async def __aenter__(self) -> Self:
        runner = EngineRunner(self._engine, steps_s=lambda: self._timed.seconds)
        runner.on_tick = self.on_tick
        self._runner = await self._stack.enter_async_context(runner)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def watch(self, *, hung_after_s: float = inf) -> None:
        """Returns never. Raises UnavailableError when the engine has ended or hangs: only a new process helps then."""
        await self._entered.watch(hung_after_s=hung_after_s)

    async def denoise(
        self,
        job: DenoiseJob,
        *,
        key: Hashable = None,
        label: str = "",
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Runs one job in the batch; cancelling the caller frees its slot before the next tick.

        Args:
            key: by which `change` finds the job; None = it will not be changed.
            label: by which `work` shows it.
            on_wait: called with every tick of the others while the job waits for a slot.

        Returns:
            Final latents, float32 [C, H, W].

        Raises:
            InvalidRequestError: the job cannot be run.
            GenerationError: the network failed or the latents are not finite.
            SuspendedError: see `suspend`.
        """
        progress = (lambda event: on_progress(event.step, event.steps)) if on_progress else None
        preview = (lambda event: on_preview(event.step, event.latents)) if on_preview else None
        image = self.image(job, handle=next(self._handles))
        with self._changeable(key, image.handle, job), self._shown(image.handle, label, job.sampler):
            async with self._mixes.held(image.variant, on_wait=on_wait):
                return await self._entered.run(image, on_progress=progress, on_preview=preview, on_wait=on_wait)

    @property
    def work(self) -> tuple[SlotView, ...]:
        """What the slots hold, once it has begun; for any thread."""
        # Copied in one go: images come and go on the event loop meanwhile.
        found = ((said, self._entered.place(handle)) for handle, said in self._labels.copy().items())
        return tuple(SlotView(label, *place, sampler) for (label, sampler), place in found if place)

    @contextmanager
    def _shown(self, handle: Hashable, label: str, sampler: str) -> Iterator[None]:
        self._labels[handle] = label, sampler
        try:
            yield
        finally:
            del self._labels[handle]

    def _admit(self, waiting: list[Image], under_way: dict[Hashable, Variant]) -> None:
        """Gives slots to images that wait, as far as there are any, and as many variants as are kept."""
        for image in list(waiting):
            if self._engine.free and fits(image.variant, under_way.values(), most=self._most_mixes):
                self._engine.admit(image)
                under_way[image.handle] = image.variant
                waiting.remove(image)

    def suspend(self) -> None:
        """Ends every `denoise` after the current tick with SuspendedError, and takes no more."""
        self._entered.suspend()

    async def change(self, key: Hashable, change: JobChange) -> None:
        """Changes a job that is under way; it goes on from the step where it is.

        What was evaluated for the old texts is not used again. A new strength starts the image anew from its source.

        Raises:
            NotFoundError: no job of this key is under way, or it ended meanwhile.
            InvalidRequestError: the changed job cannot be run.
        """
        if key not in self._changeable_jobs:
            raise NotFoundError(f"no image {key!r} is being denoised here")
        before = self._changeable_jobs[key]
        handle, job = before
        changed = _changed(job, change)
        restart = change.strength is not None
        # Refused here, where the caller can be told.
        self.image(changed, handle=handle)
        # At once: a change that comes meanwhile is one of this job, and it is made after this one.
        after = self._changeable_jobs[key] = handle, changed
        try:
            await self._entered.change(
                handle,
                lambda op: self.image(changed, handle=handle, resume_at=0 if restart else op.step),
                restart=restart,
            )
        except Exception:
            # Unless the key has been given to another image, or another change was made on top.
            if self._changeable_jobs.get(key) is after:
                self._changeable_jobs[key] = before
            raise

    def image(self, job: DenoiseJob, *, handle: Hashable, resume_at: int = 0) -> Image:
        """Compiles the job's sampler and checks its arrays. Raises InvalidRequestError."""
        check_variant(self.card, job.variant)
        check_control_image(job.variant.control, job.control_image is not None, job.control_scale)
        shape = self._denoiser.latent_shape(job.height, job.width)
        program = self._program(job, shape, resume_at)
        for role in program.roles - job.conditioning.keys():
            given = f"none for the {role.name.lower()} text"
            raise InvalidRequestError("conditioning", given, f"one: the sampler {job.sampler} uses it")
        if job.mask is not None and job.init_latents is None:
            raise InvalidRequestError("mask", "a mask without init latents", "a mask together with an init image")
        noise = initial_noise(job.seed, shape) if job.noise is None else tensor("noise", job.noise, shape)
        resume = job.resume
        if resume is not None and resume.ops != len(program):
            # It comes from a denoiser of another version.
            _log.warning("begun anew: the sampler has other steps here", ops=len(program), left_with=resume.ops)
            resume = None
        return Image(
            handle=handle,
            program=program,
            noise=noise,
            conditioning={role: self._conditioning(role, job.conditioning[role]) for role in program.roles},
            source=None if job.init_latents is None else tensor("init_latents", job.init_latents, shape),
            mask=None if job.mask is None else mask_tensor(job.mask, shape[1:]),
            seed=job.seed,
            preview_interval=job.preview_interval_steps,
            resume=resume,
            variant=self._variants.relevant(job.variant) if self._variants else job.variant,
            inputs={**self._denoiser.row_inputs(job.height, job.width, job.guidance), **control_inputs(job)},
        )

    def _program(self, job: DenoiseJob, shape: tuple[int, int, int], resume_at: int) -> Program:
        strength = job.strength if job.init_latents is not None else None
        request = SamplerRequest(
            job.steps, job.guidance, strength, tokens=shape[1] * shape[2] // 4, resume_at=resume_at
        )
        return compile_sampler(job.sampler, request, self.card.flow)

    def _conditioning(self, role: Role, tensors: Tensors) -> dict[str, torch.Tensor]:
        shapes = self._denoiser.conditioning_shapes
        field = f"{role.name.lower()} conditioning"
        if set(tensors) != set(shapes):
            raise InvalidRequestError(field, sorted(tensors), "the tensors " + ", ".join(shapes))
        return {name: tensor(f"{field}.{name}", tensors[name], shape) for name, shape in shapes.items()}

    @property
    def _entered(self) -> EngineRunner:
        if self._runner is None:
            raise RuntimeError("enter the stage first: async with DenoiserStage(...) as stage")
        return self._runner

    @contextmanager
    def _changeable(self, key: Hashable, handle: Hashable, job: DenoiseJob) -> Iterator[None]:
        if key is None:
            yield
            return
        if key in self._changeable_jobs:
            raise InvalidRequestError("key", key, "one that no image under way has")
        self._changeable_jobs[key] = handle, job
        try:
            yield
        finally:
            del self._changeable_jobs[key]


def _changed(job: DenoiseJob, change: JobChange) -> DenoiseJob:
    if change.strength is not None and job.init_latents is None:
        raise InvalidRequestError("strength", change.strength, "only for an image that has init latents")
    return replace(
        job,
        conditioning={**job.conditioning, **(change.conditioning or {})},
        guidance=change.guidance or job.guidance,
        strength=job.strength if change.strength is None else change.strength,
        resume=None,
    )
