"""Ways to make pictures of prompts, each in a process of its own, so that they share neither threads nor memory.

A contestant is fed prompts in laps and stays as it is between them: its running batch is full when a lap begins and
when it ends, as it is under steady load.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

STEPS = 4
DIFFUSERS, STATIC, RUNNING = "diffusers", "static", "running"


@dataclass(frozen=True)
class Contestant:
    """One way.

    Attributes:
        name: in tables.
        way: `diffusers` and `static` make `slots` pictures together from beginning to end; in a `running` batch of so
            many slots pictures join and leave at every step.
        single_rows: a network call for every row, as engines need that take one timestep a call.
        compiled: see DenoiserStage.load.
    """

    name: str
    way: str
    decoder: str = "full"
    backend: str = "torch"
    dtype: str = "float32"
    slots: int = 1
    single_rows: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Task:
    """What all of them do, and where.

    Attributes:
        size_px: width and height; 0 = the model's own.
        strength: with which a gray picture is changed; 0 = text to image.
    """

    model: Path
    engines: Path
    device: str = "cpu"
    size_px: int = 0
    strength: float = 0.0


@dataclass(frozen=True)
class Asked:
    """One picture; its number is its seed too."""

    number: int
    prompt: str


@dataclass
class Lap:
    """What came out while the prompts of a lap went in.

    Attributes:
        pictures: uint8 [H, W, 3] by number; some may have been asked for in the lap before.
        latencies_s: of each, from when it was taken up until its pixels were there.
        energy_j: of the GPU; None where it does not say.
    """

    seconds: float = 0.0
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    energy_j: float | None = None


class Stopwatch:
    """How long pictures take; between laps it stands still."""

    def __init__(self) -> None:
        self._ran_s, self._since_s = 0.0, time.perf_counter()
        self._began_s: dict[int, float] = {}

    def start(self) -> None:
        self._since_s = time.perf_counter()

    def stop(self) -> float:
        """Seconds since its start."""
        lap_s = time.perf_counter() - self._since_s
        self._ran_s += lap_s
        return lap_s

    def take_up(self, asked: Iterable[Asked]) -> None:
        self._began_s |= {one.number: self._now_s for one in asked}

    def done(self, number: int) -> float:
        return self._now_s - self._began_s.pop(number)

    @property
    def _now_s(self) -> float:
        return self._ran_s + time.perf_counter() - self._since_s


Pictures = Mapping[int, np.ndarray]


class Way(Protocol):
    def make(self, asked: Sequence[Asked], watch: Stopwatch) -> Iterator[Pictures]:
        """Takes all of them up, and gives pictures as they come; where nothing is asked for, those still under way."""
        ...


def run(contestant: Contestant, task: Task, connection: Connection) -> None:
    """The process of a contestant: answers every list of Asked with a Lap, until the other side closes."""
    way, watch, energy = _WAYS[contestant.way](contestant, task), Stopwatch(), _Energy(task.device)
    connection.send(None)
    while True:
        try:
            asked: list[Asked] = connection.recv()
        except EOFError:
            return
        lap = Lap()
        before_j = energy.read()
        watch.start()
        for pictures in way.make(asked, watch):
            lap.pictures |= pictures
            lap.latencies_s += [watch.done(number) for number in pictures]
        lap.seconds = watch.stop()
        if before_j is not None:
            lap.energy_j = energy.read() - before_j
        lap.peak_mib = _peak_mib(task.device)
        connection.send(lap)


class _Diffusers:
    """The pipeline of diffusers on the same checkpoint, eager."""

    def __init__(self, contestant: Contestant, task: Task) -> None:
        import torch

        from streamflow.families.libraries import from_diffusers, from_transformers

        # The pipelines look for it, and then it is quiet already.
        from_transformers("CLIPTextModel")

        class Scheduler(from_diffusers("FlowMatchEulerDiscreteScheduler")):  # type: ignore[misc]
            """What the pipelines of Stable Diffusion ask for, and the flow scheduler lacks."""

            init_noise_sigma = 1.0

            def scale_model_input(self, sample: Any, timestep: Any) -> Any:
                return sample

            def add_noise(self, sample: Any, noise: Any, timestep: Any) -> Any:
                return self.scale_noise(sample, timestep, noise)

        dtype = getattr(torch, contestant.dtype)
        parts: dict[str, Any] = {"scheduler": Scheduler.from_pretrained(task.model / "scheduler")}
        if contestant.decoder == "tiny":
            parts["vae"] = from_diffusers("AutoencoderTiny").from_pretrained(task.model / "tiny_vae", dtype=dtype)
        kind = from_diffusers("StableDiffusionImg2ImgPipeline" if task.strength else "StableDiffusionPipeline")
        self._pipeline = kind.from_pretrained(task.model, dtype=dtype, **parts).to(task.device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._slots, self._generator = contestant.slots, torch.Generator
        self._size = task.size_px or self._pipeline.unet.config.sample_size * self._pipeline.vae_scale_factor
        self._source = {"strength": task.strength} if task.strength else {"height": self._size, "width": self._size}

    def make(self, asked: Sequence[Asked], watch: Stopwatch) -> Iterator[Pictures]:
        for chunk in chunks(asked, self._slots):
            watch.take_up(chunk)
            if "strength" in self._source:
                self._source |= {"image": [_gray(self._size)] * len(chunk)}
            made = self._pipeline(
                [one.prompt for one in chunk],
                num_inference_steps=STEPS,
                sigmas=[1 - step / STEPS for step in range(STEPS)],
                guidance_scale=1.0,
                generator=[self._generator().manual_seed(one.number) for one in chunk],
                output_type="np",
                **self._source,
            )
            pixels = (made.images * 255).round().astype(np.uint8)
            yield {one.number: picture for one, picture in zip(chunk, pixels, strict=True)}


class _Stages:
    """Our three stages, in one thread."""

    def __init__(self, contestant: Contestant, task: Task) -> None:
        from streamflow.backends.select import leave_cores, open_parts
        from streamflow.families import load_denoiser
        from streamflow.stages.decoder import DecoderStage
        from streamflow.stages.denoiser import DenoiserStage
        from streamflow.stages.encoder import EncoderStage
        from streamflow.stages.sizing import choose_step
        from streamflow.types import DecoderKind

        where: dict[str, Any] = {
            "device": task.device,
            "dtype": contestant.dtype,
            "backend": contestant.backend,
            "engines": task.engines,
            "make_engines": contestant.backend == "tensorrt",
        }
        self._task, self._slots = task, contestant.slots
        self._encoder, self._decoder = (stage.load(task.model, **where) for stage in (EncoderStage, DecoderStage))
        self._kind = DecoderKind(contestant.decoder)
        if contestant.single_rows:
            open_part = open_parts(**where)
            denoiser = load_denoiser(task.model, open_part)
            networks = {name: _SingleRows(network) for name, network in denoiser.networks.items()}
            step = choose_step(denoiser, open_part.device, compiled=False)
            denoiser = replace(denoiser, networks=networks)
            self._denoiser = DenoiserStage(denoiser, slots=self._slots, device=task.device, step=step)
        else:
            self._denoiser = DenoiserStage.load(task.model, **where, slots=self._slots, compiled=contestant.compiled)
        leave_cores(", ".join((self._encoder.backend, self._decoder.backend)))

    def _jobs(self, asked: Sequence[Asked]) -> list[Any]:
        from streamflow.flow.guidance import Guidance
        from streamflow.flow.programs import Role
        from streamflow.types import DenoiseJob, EncodeJob

        size = self._task.size_px or self._denoiser.card.default_height
        source = _gray(size) if self._task.strength else None
        encoded = self._encoder.encode([EncodeJob({Role.TARGET: one.prompt}, init_image=source) for one in asked])
        return [
            DenoiseJob(
                texts.conditioning,
                STEPS,
                Guidance(1.0),
                "euler",
                one.number,
                size,
                size,
                init_latents=texts.init_latents,
                strength=self._task.strength or 1.0,
            )
            for one, texts in zip(asked, encoded, strict=True)
        ]

    def _pictures(self, latents: Mapping[Any, np.ndarray]) -> Pictures:
        decoded = self._decoder.decode(np.stack(list(latents.values())), self._kind)
        return dict(zip(latents, decoded, strict=True))


class _Static(_Stages):
    """Batches that begin and end together."""

    def make(self, asked: Sequence[Asked], watch: Stopwatch) -> Iterator[Pictures]:
        for chunk in chunks(asked, self._slots):
            watch.take_up(chunk)
            latents = self._denoiser.run(self._jobs(chunk))
            yield self._pictures({one.number: latent for one, latent in zip(chunk, latents, strict=True)})


class _Running(_Stages):
    """The running batch: at every tick some join and as many leave, so that each tick has all timesteps in it."""

    def make(self, asked: Sequence[Asked], watch: Stopwatch) -> Iterator[Pictures]:
        engine, waiting, some = self._denoiser.engine, deque(asked), max(1, self._slots // STEPS)
        while waiting or (not asked and len(engine)):
            joining = [waiting.popleft() for _ in range(min(some, engine.free, len(waiting)))]
            watch.take_up(joining)
            for one, job in zip(joining, self._jobs(joining) if joining else [], strict=True):
                engine.admit(self._denoiser.image(job, handle=one.number))
            report = engine.tick()
            for error in report.failed.values():
                raise error
            if report.retired:
                yield self._pictures(report.retired)


class _SingleRows:
    """A network that is called once for every row."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self.name, self.row_counts = f"{network.name}, single rows", None
        self.row_invariant, self.takes_velocity = True, network.takes_velocity
        self.guided_channels = network.guided_channels

    def __call__(self, latents: Any, timestep: Any, conditioning: Mapping[str, Any]) -> Any:
        import torch

        rows = [slice(k, k + 1) for k in range(len(latents))]
        texts = [{name: values[row] for name, values in conditioning.items()} for row in rows]
        calls = zip(rows, texts, strict=True)
        return torch.cat([self._network(latents[row], timestep[row], text) for row, text in calls])


_WAYS: Mapping[str, Any] = {DIFFUSERS: _Diffusers, STATIC: _Static, RUNNING: _Running}


class _Energy:
    """What a GPU has used since its driver was loaded, where pynvml is installed."""

    def __init__(self, device: str) -> None:
        self._read_mj: Callable[[], int] | None = None
        if device.startswith("cuda") and find_spec("pynvml") is not None:
            import pynvml
            import torch

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._read_mj = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)

    def read(self) -> float | None:
        """Joules; None where nobody says."""
        return None if self._read_mj is None else self._read_mj() / 1000


def _peak_mib(device: str) -> float:
    """Of a GPU's memory there, else of the process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _gray(size: int) -> Any:
    return np.full((size, size, 3), 127, np.uint8)


def chunks(asked: Iterable[Asked], count: int) -> Iterator[list[Asked]]:
    """Parts of `count`; the last may be smaller."""
    rest = iter(asked)
    while chunk := list(islice(rest, count)):
        yield chunk
