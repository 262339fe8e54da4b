"""The values that the parts of StreamFlow hand to each other: frozen, and free of torch, gRPC and Redis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.flow.spec import FlowSpec

Tensors = Mapping[str, np.ndarray]
"""Named arrays, such as the conditioning of one prompt: {"prompt_embeds": float32 [tokens, width]}."""


class Stage(StrEnum):
    """The three stages; the value names the stream that feeds each."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"

    @property
    def service(self) -> str:
        """The name of the service that runs this stage, as users see it."""
        return {"encode": "encoder", "denoise": "denoiser", "decode": "decoder"}[self.value]


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    IMAGES = "images"
    ERROR = "error"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"

    @property
    def terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class ImageFormat(StrEnum):
    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    RAW = "raw"


class DecoderKind(StrEnum):
    TINY = "tiny"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image or a job did not give a picture: a gRPC status name, one sentence, and the stage."""

    code: str
    message: str
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may have; None = what the deployment gives every tenant.

    Attributes:
        jobs: unfinished at once; 0 = as many as of all tenants.
        images_per_minute: 0 = any number.
    """

    jobs: int | None = None
    images_per_minute: float | None = None


NO_QUOTA = Quota()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What one checkpoint offers, and the values that a request's unset fields take.

    Sizes are pixels; `size_multiple` is what width and height must be a multiple of. `flow` is what samplers are
    compiled for.

    Attributes:
        revision: of the weights and of what requests may add to them; jobs are made by workers of their revision.
        weights_revision: of the weights alone: what graphs and engines are made of.
        class_labels: how many there are, for models that take them in place of prompts; 0 = it takes prompts.
        embedded_guidance: guidance_scale goes to the network; guidance with a negative prompt is true_cfg_scale.
        adapters, controls: names of LoRA adapters and ControlNets that requests may use.
    """

    name: str
    family: str
    revision: str
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
    default_decoder: DecoderKind
    max_prompt_tokens: int
    latent_channels: int
    latent_factor: int
    flow: FlowSpec = field(default_factory=FlowSpec)
    weights_revision: str = ""
    class_labels: int = 0
    embedded_guidance: bool = False
    adapters: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    def guidance_scales(self, guidance_scale: float, true_cfg_scale: float | None) -> tuple[float, float]:
        """Of the guidance between two rows, and what the network is fed, from what a request says."""
        return (true_cfg_scale or 1.0, guidance_scale) if self.embedded_guidance else (guidance_scale, 0.0)


@dataclass(frozen=True, slots=True, order=True)
class AdapterUse:
    """A LoRA adapter in a request: the weights that it changes move by `weight` times what it holds."""

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        # As requests carry it: all forms add the same.
        object.__setattr__(self, "weight", float(np.float32(self.weight)))

    def changes(self, names: Collection[str]) -> bool:
        """Whether it changes a network that the adapters of these names can change."""
        return self.weight != 0 and self.name in names


def adapter_uses(weights: Iterable[tuple[str, float]]) -> tuple[AdapterUse, ...]:
    """In the order of their names."""
    return tuple(sorted(AdapterUse(name, weight) for name, weight in weights))


@dataclass(frozen=True, slots=True)
class Variant:
    """Which weights and networks an image runs with; images of different ones share no network call.

    Attributes:
        adapters: in the order of their names.
        control: the name of a ControlNet; empty = none.
    """

    adapters: tuple[AdapterUse, ...] = ()
    control: str = ""


PLAIN = Variant()
"""The model as it is."""


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """The texts of one image, and the images that it starts from.

    Attributes:
        texts: by what they are for; those that the sampler needs.
        init_image: uint8 [height, width, 3], already of the request's size; or None.
        mask: uint8 [height, width], 255 = repaint; or None.
        adapters: those that change text encoders act on the texts.
    """

    texts: Mapping[Role, str]
    init_image: np.ndarray | None = None
    mask: np.ndarray | None = None
    adapters: tuple[AdapterUse, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodedJob:
    """What the encoder makes of an EncodeJob.

    Attributes:
        conditioning: for each of its texts, named arrays without a batch axis.
        init_latents: float32 [channels, height / f, width / f], scaled; or None.
        mask: float32 [height / f, width / f] in [0, 1], 1 = repaint; or None.
        warnings: sentences for the user, such as what was cut off a prompt.
    """

    conditioning: Mapping[Role, Tensors]
    init_latents: np.ndarray | None = None
    mask: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class SlotState:
    """Where an image stands between two network evaluations, so that any denoiser can go on with it.

    Attributes:
        latents, velocity: float32 [channels, height / f, width / f]; see flow/programs.py.
        ops_done: evaluations that are behind it.
        ops: of its program.
    """

    latents: np.ndarray
    velocity: np.ndarray
    ops_done: int
    ops: int


@dataclass(frozen=True, slots=True)
class DenoiseJob:
    """One image for the running batch.

    Attributes:
        conditioning: see EncodedJob; for the roles that the sampler needs.
        steps: of the whole schedule, before `strength` shortens it.
        guidance: how it is guided.
        sampler: a name with options, such as "euler", or blocks, such as "H2P4R2".
        seed: of this image (the request's seed plus the image's index), in [0, 2**64).
        height, width: pixels.
        init_latents, strength, mask: for images that start from another; see EncodedJob.
        noise: float32 [channels, height / f, width / f] in place of the seed's; or None.
        preview_interval_steps: a preview after every so many steps; 0 = none.
        resume: where another denoiser left it; None = it begins here.
        variant: of the model.
        control_image: what its ControlNet reads, uint8 [height, width, 3]; None without one.
        control_scale: how strongly that acts.
    """

    conditioning: Mapping[Role, Tensors]
    steps: int
    guidance: Guidance
    sampler: str
    seed: int
    height: int
    width: int
    init_latents: np.ndarray | None = None
    strength: float = 1.0
    mask: np.ndarray | None = None
    noise: np.ndarray | None = None
    preview_interval_steps: int = 0
    resume: SlotState | None = None
    variant: Variant = PLAIN
    control_image: np.ndarray | None = None
    control_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class JobChange:
    """What changes for an image that is under way; None = stays as it is.

    Attributes:
        conditioning: the roles in it are replaced.
        strength: of an image with init latents, which then starts again from them.
    """

    conditioning: Mapping[Role, Tensors] | None = None
    guidance: Guidance | None = None
    strength: float | None = None


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """How one picture is decoded and encoded. `quality` is 1 to 100, for JPEG and WebP."""

    format: ImageFormat = ImageFormat.PNG
    quality: int = 90
    decoder: DecoderKind = DecoderKind.TINY
    embed_metadata: bool = False


@dataclass(frozen=True, slots=True)
class SlotView:
    """An image in a slot of the running batch, as it stood after its last step.

    Attributes:
        image: `<job>:<index>`; empty for a call of the denoiser itself.
        timestep: what the network was fed.
    """

    image: str
    step: int
    steps: int
    timestep: float
    sampler: str


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One replica as the registry shows it.

    Attributes:
        backlog: entries that wait for its stage.
        call_ms, row_ms: what a network call takes: `call_ms`, and `row_ms` for each of its rows; 0 = not measured.
        row_counts: to which network calls are padded; empty = to none.
        image_ms: what an image takes of its time, as measured on the last ones; 0 = not yet.
        work: of a denoiser, what its slots hold.
    """

    worker_id: str
    stage: Stage
    address: str
    model: str
    model_revision: str
    backend: str
    device: str
    slots: int
    slots_in_use: int = 0
    backlog: int = 0
    draining: bool = False
    started_at_s: float = 0.0
    counters: Mapping[str, int] = field(default_factory=dict)
    call_ms: float = 0.0
    row_ms: float = 0.0
    row_counts: tuple[int, ...] = ()
    image_ms: float = 0.0
    work: tuple[SlotView, ...] = ()
