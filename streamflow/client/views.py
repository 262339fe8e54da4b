"""Jobs, models and services as the gateway shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from streamflow.rpc.convert import decoder_from_pb, failure_from_pb, state_from_pb
from streamflow.types import DecoderKind, Failure, JobState
from streamflow.v1 import gateway_pb2, types_pb2

STAGES = ("encoder", "denoiser", "decoder")
"""In the order in which images pass them."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request as it stands; times are the server's, seconds since 1970."""

    request_id: str
    state: JobState
    num_images: int
    num_finished: int
    failure: Failure | None
    admitted_at_s: float
    deadline_at_s: float
    warnings: tuple[str, ...]
    seed: int
    model: str

    @classmethod
    def from_pb(cls, job: gateway_pb2.Job) -> Job:
        return cls(
            request_id=job.request_id,
            state=state_from_pb(job.state),
            num_images=job.num_images,
            num_finished=job.num_finished,
            failure=failure_from_pb(job.failure) if job.HasField("failure") else None,
            admitted_at_s=job.admitted_at_s,
            deadline_at_s=job.deadline_at_s,
            warnings=tuple(warning.message for warning in job.warnings),
            seed=job.seed,
            model=job.model,
        )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that was given up, because an image of it ended every attempt of a stage.

    Attributes:
        index: of the image.
        service, attempts, reason: where, after how many attempts, and what the client was told.
        at_s: by the server's clock, seconds since 1970.
        model, prompts, seed, steps, sampler: of the request.
    """

    id: str
    request_id: str
    index: int
    service: str
    attempts: int
    reason: str
    at_s: float
    model: str
    prompts: tuple[str, ...]
    seed: int
    steps: int
    sampler: str

    @classmethod
    def from_pb(cls, letter: gateway_pb2.DeadLetter) -> DeadLetter:
        return cls(
            id=letter.id,
            request_id=letter.request_id,
            index=letter.index,
            service=letter.service,
            attempts=letter.attempts,
            reason=letter.reason,
            at_s=letter.at_s,
            model=letter.request.model,
            prompts=tuple(letter.request.prompts),
            seed=letter.request.seed,
            steps=letter.request.steps,
            sampler=letter.request.sampler,
        )


@dataclass(frozen=True, slots=True)
class Model:
    """What a model offers, and the values that unset fields take. Sizes are pixels.

    Attributes:
        live: whether every stage has a replica of this revision that takes work; otherwise requests wait for one.
        class_labels: how many there are, for a model that takes them in place of prompts; 0 = it takes prompts.
        embedded_guidance: guidance_scale is fed to the network; guidance with a negative prompt is true_cfg_scale.
        adapters, controls: names of LoRA adapters and ControlNets that requests may use.
    """

    name: str
    revision: str
    family: str
    default_width: int
    default_height: int
    size_multiple: int
    max_width: int
    max_height: int
    default_steps: int
    max_steps: int
    default_guidance_scale: float
    default_sampler: str
    samplers: tuple[str, ...]
    decoders: tuple[DecoderKind, ...]
    max_prompt_tokens: int
    live: bool
    class_labels: int
    embedded_guidance: bool
    adapters: tuple[str, ...]
    controls: tuple[str, ...]

    @classmethod
    def from_pb(cls, model: gateway_pb2.Model) -> Model:
        return cls(
            name=model.name,
            revision=model.revision,
            family=model.family,
            default_width=model.default_width,
            default_height=model.default_height,
            size_multiple=model.size_multiple,
            max_width=model.max_width,
            max_height=model.max_height,
            default_steps=model.default_steps,
            max_steps=model.max_steps,
            default_guidance_scale=model.default_guidance_scale,
            default_sampler=model.default_sampler,
            samplers=tuple(model.samplers),
            decoders=tuple(decoder_from_pb(kind) for kind in model.decoders),
            max_prompt_tokens=model.max_prompt_tokens,
            live=model.live,
            class_labels=model.class_labels,
            embedded_guidance=model.embedded_guidance,
            adapters=tuple(model.adapters),
            controls=tuple(model.controls),
        )


@dataclass(frozen=True, slots=True)
class SlotWork:
    """An image in a slot of the running batch, as it stood after its last step.

    Attributes:
        request_id: empty for a call of the denoiser itself, and for somebody else's request.
        timestep: what the network was fed.
    """

    request_id: str
    index: int
    step: int
    steps: int
    timestep: float
    sampler: str


@dataclass(frozen=True, slots=True)
class Queue:
    """Images of one model and priority (-1, 0 or 1) that are in one place: waiting, encode, denoise or decode.

    Attributes:
        oldest_s: how long the oldest has been there; of those that wait, since their admission.
    """

    model: str
    place: str
    priority: int
    images: int
    oldest_s: float


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One replica of a stage.

    Attributes:
        backlog: what waits for the stage, over all replicas.
        call_ms, row_ms: what a network call takes: `call_ms`, and `row_ms` for each of its rows; 0 = not measured.
        row_counts: to which network calls are padded; empty = to none.
        work: of a denoiser, what its slots hold.
        image_ms: what an image takes of its time, measured on the last ones; 0 = not yet.
    """

    stage: str
    worker_id: str
    model: str
    model_revision: str
    backend: str
    device: str
    slots: int
    slots_in_use: int
    backlog: int
    draining: bool
    uptime_s: float
    call_ms: float
    row_ms: float
    row_counts: tuple[int, ...]
    counters: Mapping[str, int] = field(repr=False)
    work: tuple[SlotWork, ...] = field(repr=False)
    image_ms: float

    @classmethod
    def from_pb(cls, status: types_pb2.StageStatus) -> StageStatus:
        return cls(
            stage=status.stage,
            worker_id=status.worker_id,
            model=status.model,
            model_revision=status.model_revision,
            backend=status.backend,
            device=status.device,
            slots=status.slots,
            slots_in_use=status.slots_in_use,
            backlog=status.backlog,
            draining=status.draining,
            uptime_s=status.uptime_s,
            call_ms=status.call_ms,
            row_ms=status.row_ms,
            row_counts=tuple(status.row_counts),
            counters=dict(status.counters),
            work=tuple(
                SlotWork(slot.request_id, slot.index, slot.step, slot.steps, slot.timestep, slot.sampler)
                for slot in status.work
            ),
            image_ms=status.image_ms,
        )


@dataclass(frozen=True, slots=True)
class Status:
    """A deployment: its replicas, and the images admitted and not yet released to them.

    Attributes:
        model, models: the default one, and all of them with that one first.
    """

    stages: tuple[StageStatus, ...]
    waiting: int
    model: str
    models: tuple[str, ...]
    uptime_s: float
    counters: Mapping[str, int] = field(repr=False)
    queues: tuple[Queue, ...]

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Model and stage wherever there is no replica: what comes there waits for one."""
        found = []
        for model in self.models:
            # The stages of the only model are its own, whatever they call it.
            present = {stage.stage for stage in self.stages if stage.model == model or len(self.models) == 1}
            found += [(model, stage) for stage in STAGES if stage not in present]
        return found

    @classmethod
    def from_pb(cls, status: gateway_pb2.GatewayStatus) -> Status:
        return cls(
            stages=tuple(StageStatus.from_pb(stage) for stage in status.stages),
            waiting=status.waiting,
            model=status.model,
            models=tuple(status.models),
            uptime_s=status.uptime_s,
            counters=dict(status.counters),
            queues=tuple(
                Queue(queue.model, queue.place, queue.priority, queue.images, queue.oldest_s) for queue in status.queues
            ),
        )
