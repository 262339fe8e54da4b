"""Settings: the only place that reads the environment.

Every field is an environment variable with the prefix `STREAMFLOW_`, such as `STREAMFLOW_REDIS_URL`; a command line
option of the same name wins over it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from streamflow.errors import InvalidRequestError
from streamflow.model_names import DEPLOYMENT, check_names, deployment_of, name_of, read_models


def default_model() -> Path:
    """The built-in model: under the current folder, or else where this library stands in its repository."""
    here = Path("models/shapes")
    return here if here.is_dir() else Path(__file__).parent.parent / here


def default_cache() -> Path:
    """In the user's cache; a user without a home has one where the process runs."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        cache = Path(".cache")
    return cache / "streamflow"


def default_engines() -> Path:
    return default_cache() / "engines"


class NameSettings(BaseSettings):
    """What a deployment and its model are called."""

    model_config = SettingsConfigDict(env_prefix="STREAMFLOW_", extra="ignore", env_ignore_empty=True)

    deployment: str = Field(
        "default", pattern=f"^{DEPLOYMENT}$", description="Name of the deployment; part of every Redis key"
    )
    model_name: str = Field("", description="Name that clients use; empty = the folder's name")


class Settings(NameSettings):
    """What every process of a deployment needs to know."""

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,  # it may have a password in it
        description="Redis or Valkey, 6.2 or newer: redis://USER@HOST:PORT/0, rediss:// for TLS",
    )
    redis_user: str = Field("", description="User of Redis, in place of the URL's")
    redis_password_file: Path | None = Field(None, description="File with the password of Redis, in place of the URL's")
    redis_ca: Path | None = Field(None, description="Authorities (PEM) to trust with rediss://; none = the system's")
    redis_cert: Path | None = Field(None, description="Client certificate (PEM) for Redis, where it asks for one")
    redis_key: Path | None = Field(None, description="Its key (PEM)")
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(0, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level of log lines")
    log_format: Literal["json", "text"] = Field("json", description="One JSON object a line, or text for people")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of Prometheus metrics, at /metrics; 0 takes a free one, none = no metrics",
    )
    traces: str = Field(
        "", description="Where traces go: an OTLP endpoint such as http://collector:4317, or file:PATH; none = nowhere"
    )
    trace_ratio: float = Field(
        1.0, ge=0, le=1, description="How many of the requests are traced that their client does not trace already"
    )
    api_keys_file: Path | None = Field(
        None,
        description="API keys, as `streamflow keys create` makes them; none = no keys are asked for. Any key opens the "
        "gateway, and an operator's the stages as well; the file is read again when it changes",
    )
    reflection: bool = Field(False, description="Answer gRPC server reflection")
    max_message_bytes: int = Field(32 * 2**20, ge=2**20, description="Largest gRPC message to accept")
    max_calls: int = Field(
        4096,
        ge=1,
        description="gRPC calls at once, of which a tenant that has a key gets half; more are refused with a retry "
        "delay. A client that waits for its pictures holds one",
    )
    drain_grace_s: float = Field(20.0, ge=0, description="How long SIGTERM waits for unfinished work")
    lease_s: float = Field(10.0, ge=0.5, description="A worker that is not heard of for so long loses its work")
    result_keep_s: float = Field(900.0, ge=60, description="How long images that nobody fetched are kept")
    job_keep_s: float = Field(3600.0, ge=60, description="How long it can be read how a job ended")


OF_REDIS = ("redis_user", "redis_password_file", "redis_ca", "redis_cert", "redis_key")
"""Settings that belong to a redis_url."""


class ModelSettings(NameSettings):
    """Which checkpoint is served, and as what: the same in every process of a deployment."""

    model: Path = Field(
        default_factory=default_model,
        description="Checkpoint folder in diffusers layout, or a name on the Hugging Face hub: org/name[@revision]",
    )
    flow: Literal["auto", "rectified", "instaflow", "2rf", "perflow"] = Field(
        "auto", description="What the weights were distilled to, where the checkpoint's scheduler does not tell"
    )
    unet_delta: Path | None = Field(
        None, description="Safetensors file with weights to add to the UNet's, as PeRFlow publishes them for any base"
    )
    tiny_vae: Path | None = Field(
        None,
        description="Folder (or name on the hub) of a tiny autoencoder, in place of the checkpoint's tiny_vae; "
        "family = the one that is published for its family",
    )
    adapters: Path | None = Field(
        None, description="Folder of LoRA adapters that requests may name: NAME.safetensors, or folders NAME"
    )
    controls: Path | None = Field(None, description="Folder of ControlNets that requests may name: folders NAME")
    allow_pickle: bool = Field(
        False, description="Load weights that are not safetensors; such files can run code: only where you trust them"
    )
    cache: Path = Field(default_factory=default_cache, description="Where digests of weights are remembered")


OF_ONE_MODEL = ("flow", "unet_delta", "tiny_vae", "adapters", "controls")
"""Settings of the default model that are nothing to further ones."""


class EngineSettings(BaseSettings):
    """Where what runs networks fast is kept."""

    model_config = SettingsConfigDict(env_prefix="STREAMFLOW_", extra="ignore", env_ignore_empty=True)

    engines: Path = Field(
        default_factory=default_engines, description="Where `streamflow engine` puts the graphs and engines of networks"
    )
    make_engines: bool = Field(
        False, description="Make the graphs and engines that are missing before serving, which takes minutes"
    )


class StageSettings(EngineSettings, ModelSettings, Settings):
    """A stage of a deployment: a text encoder, a denoiser or a decoder, which takes its work from Redis."""

    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto = a GPU where there is one")
    gpu: str = Field(
        "auto",
        description="Which of several GPUs it gets: number or UUID as nvidia-smi -L says; auto = the one with the "
        "least work, by leases in Redis; none = no choice is made, all stay visible",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Precision of the networks; auto = float32 on a CPU, float16 on a GPU"
    )
    backend: Literal["auto", "tensorrt", "torch", "onnxruntime", "openvino"] = Field(
        "auto",
        description="What runs the networks; auto = the fastest for which there is an engine or a graph, or else torch",
    )
    threads: int = Field(0, ge=0, description="CPU threads of the networks; 0 = all cores (1 in deterministic mode)")
    deterministic: bool = Field(
        False, description="Equal bytes whatever the neighbours: one row count for every call, fixed threads"
    )
    compiled: bool = Field(
        False, description="Compile network, guidance and update for each number of rows; starts slowly (denoiser)"
    )
    slots: int = Field(
        0,
        ge=0,
        le=1024,
        description="Images that it holds at once; 0 = the stage's default, by the denoiser's measured cost of a call",
    )
    max_wait_ms: float = Field(4.0, ge=0, description="How long a batch waits for more work (encoder, decoder)")
    progress_timeout_s: float = Field(
        120.0,
        gt=0,
        description="An image that makes no progress for so long gets another attempt; "
        "one network call that takes half of it ends the process, which should be started again",
    )
    image_workers: int = Field(1, ge=1, le=64, description="Processes that encode pictures (decoder)")
    prompt_cache_s: float = Field(
        3600.0, ge=0, description="How long an unused prompt's embeddings stay in Redis (encoder)"
    )


class TlsSettings(BaseSettings):
    """How the gateway encrypts; its probes need to know as well."""

    model_config = SettingsConfigDict(env_prefix="STREAMFLOW_", extra="ignore", env_ignore_empty=True)

    tls_cert: Path | None = Field(None, description="Server certificate chain (PEM), read again when it changes")
    tls_key: Path | None = Field(None, description="Server key (PEM)")


class GatewaySettings(TlsSettings, ModelSettings, Settings):
    """The gateway of a deployment: clients call it, it admits their requests and streams back what becomes of them."""

    port: int = Field(50051, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    more_models: Annotated[dict[str, Path], NoDecode] = Field(
        default_factory=dict,
        description="Further models as NAME=PATH, with commas between them; the stages of each are those of the "
        "deployment DEPLOYMENT-NAME",
    )
    health_port: int = Field(
        0, ge=0, le=65535, description="Port on which health checks alone are answered, without TLS; 0 = none"
    )
    log_prompts: bool = Field(False, description="Write prompts into the log; otherwise a hash stands for them")
    max_jobs: int = Field(1000, ge=1, description="Unfinished jobs at once; more are refused with a retry delay")
    max_tenant_jobs: int = Field(0, ge=0, description="Unfinished jobs of one tenant at once; 0 = as many as of all")
    tenant_images_per_minute: float = Field(
        0.0, ge=0, description="Images that one tenant may ask for in a minute; 0 = any number"
    )
    max_reserved_bytes: int = Field(512 * 2**20, ge=2**20, description="Bytes that results may take in Redis")
    max_tenant_reserved_bytes: int = Field(0, ge=0, description="Of one tenant's results; 0 = as many as of all")
    default_timeout_s: float = Field(600.0, gt=0, description="Deadline of a call that sets none")
    max_timeout_s: float = Field(3600.0, gt=0, description="Longest deadline")
    max_prompts: int = Field(16, ge=1, description="Prompts in one request")
    max_images: int = Field(64, ge=1, description="Images in one request")
    max_prompt_chars: int = Field(4000, ge=1, description="Characters of one prompt")
    max_image_bytes: int = Field(16 * 2**20, ge=2**16, description="Bytes of an init image or mask")
    max_image_pixels: int = Field(4_000_000, ge=4096, description="Pixels of an init image or mask")
    # Renewed every third of it. A client finds out within 15 s that its gateway's machine is gone, and then needs a
    # moment to get to another gateway.
    watch_lease_s: float = Field(
        30.0, gt=0, description="A job that is not detached ends when nobody watched it so long"
    )
    reap_interval_s: float = Field(1.0, gt=0, description="How often expired jobs and results are cleared")

    @field_validator("more_models", mode="before")
    @classmethod
    def _read_models(cls, given: object) -> object:
        return read_models(given) if isinstance(given, str) else given

    @field_validator("more_models")
    @classmethod
    def _check_names(cls, models: dict[str, Path], info: ValidationInfo) -> dict[str, Path]:
        # What has been refused already is not among them.
        if {"deployment", "model", "model_name"} <= info.data.keys():
            default = name_of(info.data["model"], info.data["model_name"])
            check_names(models, deployment=info.data["deployment"], default=default)
        return models

    def each(self) -> list[GatewaySettings]:
        """Those of every model as if it were alone, the default model's first."""
        plain = {name: ModelSettings.model_fields[name].default for name in OF_ONE_MODEL}
        further = (
            {**plain, "deployment": deployment_of(self.deployment, name), "model": folder, "model_name": name}
            for name, folder in self.more_models.items()
        )
        return [self.model_copy(update={"more_models": {}, **own}) for own in ({}, *further)]


class ClientSettings(BaseSettings):
    """What the command line needs to reach a deployment; the SDK takes arguments only."""

    model_config = SettingsConfigDict(env_prefix="STREAMFLOW_", extra="ignore", env_ignore_empty=True)

    address: str = Field(default="127.0.0.1:50051", description="Address of a gateway")
    api_key: str | None = Field(default=None, description="Key to send with every call", repr=False)
    tls_ca: Path | None = Field(default=None, description="Certificate authority (PEM) to trust; turns TLS on")
    api_keys_file: Path | None = Field(default=None, description="File that `streamflow keys` works on")


SettingsT = TypeVar("SettingsT", bound=Settings)


def settings_from(argv: Sequence[str], kind: type[SettingsT], *, program: str) -> SettingsT:
    """Settings from the environment and from options, one for every setting, such as `--redis-url`.

    Raises:
        SystemExit: with 0 after `--help`; with 2 and a line for each setting that cannot be used.
    """
    try:
        return kind(_cli_parse_args=list(argv), _cli_prog_name=program, _cli_kebab_case=True)
    except ValidationError as error:
        _refuse([line for _, line in _lines(error)], program)


def check_environment(*, but: Collection[str], program: str) -> None:
    """Checks what the environment says to the processes of a deployment, except for these settings.

    Raises:
        SystemExit: with 2 and a line for each setting that cannot be used.
    """
    lines = dict.fromkeys(
        line for kind in (GatewaySettings, StageSettings) for name, line in _wrong(kind) if name not in but
    )
    if lines:
        _refuse(lines, program)


def misspelled() -> dict[str, str]:
    """Variables that are no settings and look like one, with that one: what they were to turn on is off.

    Others are left alone, since the environment has those of Compose and of tools besides.
    """
    kinds: tuple[type[BaseSettings], ...] = (GatewaySettings, StageSettings, ClientSettings)
    known = {f"STREAMFLOW_{name.upper()}" for kind in kinds for name in kind.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith("STREAMFLOW_") and name not in known)
    alike = {name: get_close_matches(name, known, n=1, cutoff=0.93) for name in unknown}
    return {name: meant[0] for name, meant in alike.items() if meant}


def _wrong(kind: type[Settings]) -> Iterator[tuple[str, str]]:
    """The settings that cannot be used, and why."""
    try:
        kind()
    except ValidationError as error:
        yield from _lines(error)


def _lines(error: ValidationError) -> Iterator[tuple[str, str]]:
    for one in error.errors():
        name, ours = ".".join(map(str, one["loc"])), one.get("ctx", {}).get("error")
        # Our own say all of it themselves.
        yield (
            name,
            str(ours) if isinstance(ours, InvalidRequestError) else f"{name}: got {one['input']!r}; {one['msg']}",
        )


def _refuse(lines: Iterable[str], program: str) -> NoReturn:
    print(*(f"{program}: {line}" for line in lines), sep="\n", file=sys.stderr)
    raise SystemExit(2)


def environment_without_settings() -> dict[str, str]:
    """For a child that must know nothing of this deployment, and no password that is among its settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STREAMFLOW_")}


def quiet_grpc() -> None:
    """Keeps what gRPC says of its connections out of the log, unless GRPC_VERBOSITY is set; before grpc is imported.

    It says it beside the log's format, and any peer can make it.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def visible_gpus() -> str | None:
    """CUDA_VISIBLE_DEVICES, where it is set."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def show_gpu(uuid: str) -> None:
    """Lets CUDA see this one alone; for before it is asked for any."""
    os.environ["CUDA_VISIBLE_DEVICES"] = uuid


def child_environment(settings: Mapping[str, object]) -> dict[str, str]:
    """This process's environment for a child, with settings by field name put over it."""
    return {**os.environ, **{f"STREAMFLOW_{name.upper()}": str(value) for name, value in settings.items()}}
