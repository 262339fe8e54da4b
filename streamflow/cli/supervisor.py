"""A whole deployment on this machine: Redis, the gateway and the stages as processes that are kept running.

async with LocalDeployment(model="models/shapes") as deployment:
    async with AsyncClient(deployment.address) as client:
        await client.generate("a red circle on a white background")
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import urlsplit

from streamflow.cli.model_settings import folder_of, settings_by_model
from streamflow.cli.probes import check_folders, check_ports, check_redis, serving
from streamflow.cli.process import Command, OnLine, Supervised
from streamflow.config import (
    OF_REDIS,
    EngineSettings,
    GatewaySettings,
    ModelSettings,
    Settings,
    TlsSettings,
    child_environment,
)
from streamflow.errors import InvalidRequestError, NotFoundError
from streamflow.families import describe
from streamflow.families.source import checkpoint_from, default_name
from streamflow.gpus import WEIGHTS, Gpu, find, least_used, place
from streamflow.model_names import write_models
from streamflow.ports import LOOPBACK, free_port, join
from streamflow.rpc.certificates import certificate_files
from streamflow.rpc.key_file import KeyFile
from streamflow.telemetry.traces import open_tracing
from streamflow.types import ModelCard

SERVICES: Mapping[str, str] = {
    "gateway": "streamflow.v1.Gateway",
    "encoder": "streamflow.v1.TextEncoder",
    "denoiser": "streamflow.v1.Denoiser",
    "decoder": "streamflow.v1.Decoder",
}
"""The gRPC service by which each kind of process says that it is ready."""

COMMANDS: Mapping[str, Sequence[str]] = {
    "gateway": (sys.executable, "-m", "gateway"),
    "encoder": (sys.executable, "-m", "services.encoder"),
    "denoiser": (sys.executable, "-m", "services.denoiser"),
    "decoder": (sys.executable, "-m", "services.decoder"),
}

_WEIGHTS = {stage.service: weight for stage, weight in WEIGHTS.items()}

# What a process needs on top of its drain to end.
_EXIT_S = 5.0


class LocalDeployment:
    """Runs while its context is entered; entering returns when every process is ready for work.

    Args:
        model: checkpoint folder.
        more_models: checkpoint folders of further models by name; each has replicas of its own.
        host, port: where the gateway listens; port 0 takes a free one.
        redis_url: of a running Redis; None = a private one that ends with the deployment.
        data_dir: where the private Redis keeps its data; None = a temporary folder.
        encoders, denoisers, decoders: replicas, of every model.
        deterministic, threads: of every stage; None = what its environment says.
        slots: of every denoiser; 0 = its default.
        settings: further settings for every process, by field name (see streamflow.config).
        gpus: for the stages, each of which gets one; empty = every process chooses by itself.
        log_dir: a file for each process; None = no files.
        on_line: takes every line that a process writes, with its name.
        ready_timeout_s: for the start of a process; None = 3 minutes, or 2 hours where it makes its engines first.
        grace_s: how long a process may drain after SIGTERM.
        commands: what runs each kind of process.

    Raises:
        InvalidRequestError: there is no checkpoint there, or another argument cannot be used.
        UnavailableError: there is no redis-server, or a process did not become ready; the message has its last lines.
    """

    def __init__(
        self,
        *,
        model: str | Path = "models/shapes",
        more_models: Mapping[str, str | Path] = MappingProxyType({}),
        host: str = LOOPBACK,
        port: int = 0,
        redis_url: str | None = None,
        data_dir: Path | None = None,
        encoders: int = 1,
        denoisers: int = 1,
        decoders: int = 1,
        deterministic: bool | None = None,
        slots: int = 0,
        threads: int | None = None,
        settings: Mapping[str, object] = MappingProxyType({}),
        gpus: Sequence[Gpu] = (),
        log_dir: Path | None = None,
        on_line: OnLine | None = None,
        ready_timeout_s: float | None = None,
        grace_s: float = 20.0,
        commands: Mapping[str, Sequence[str]] = COMMANDS,
    ) -> None:
        self._host, self._port, self._redis_url, self._data_dir = host, port, redis_url, data_dir
        self._replicas = {"encoder": encoders, "denoiser": denoisers, "decoder": decoders}
        self._slots, self._commands, self._gpus = slots, commands, gpus
        given, called = {"deterministic": deterministic, "threads": threads}, default_name(Path(model))
        self._settings = {
            "model": folder_of(model),
            **({"model_name": called} if called else {}),
            **{name: value for name, value in given.items() if value is not None},
            "log_format": "text",
            "drain_grace_s": grace_s,
            **settings,
        }
        self._models = settings_by_model(self._settings, more_models)
        folders = {name: own["model"] for name, own in self._models.items() if own}
        self._settings["more_models"] = write_models(folders)
        self._log_dir, self._user_on_line = log_dir, on_line
        makes_engines = self._settings.get("make_engines", EngineSettings().make_engines)
        self._ready_timeout_s = ready_timeout_s or (7200.0 if makes_engines else 180.0)
        self._grace_s = grace_s
        wanted = self._settings.get("metrics_port", Settings().metrics_port)
        self._metrics_port = None if wanted is None else int(str(wanted))
        self._cards: list[ModelCard] = []
        self._processes: dict[str, Supervised] = {}
        self._addresses: dict[str, str] = {}
        self._metrics: dict[str, str] = {}
        self._numbers = Counter[tuple[str, str]]()
        self._model_of: dict[str, str] = {}
        self._gpu_of: dict[str, tuple[Gpu, float]] = {}
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()

    def __repr__(self) -> str:
        return f"<LocalDeployment {self._addresses.get('gateway', 'not started')}, {len(self._processes)} processes>"

    @property
    def address(self) -> str:
        """Of the gateway."""
        return self.addresses["gateway"]

    @property
    def addresses(self) -> Mapping[str, str]:
        """`host:port` of every process, by name: gateway, encoder-1, denoiser-1 ..., and redis if it is ours.

        Those of a further model have its name in front, as in `shapes-encoder-1`.
        """
        return self._addresses

    @property
    def metrics(self) -> Mapping[str, str]:
        """Where Prometheus finds the metrics of every process, by name; empty unless `metrics_port` is set.

        The gateway has that port, and every other process one of its own.
        """
        return self._metrics

    @property
    def cards(self) -> Sequence[ModelCard]:
        """What the models offer, the default one first; known once the deployment is entered."""
        return self._cards

    @property
    def models(self) -> Sequence[str]:
        """Names of what is served, the default one first."""
        return list(self._models)

    def model_of(self, name: str) -> str:
        """The model that a process works for; empty for those that work for all."""
        return self._model_of.get(name, "")

    def gpu_of(self, name: str) -> Gpu | None:
        """The GPU that a process was given."""
        return self._gpu_of[name][0] if name in self._gpu_of else None

    @property
    def redis_url(self) -> str:
        if self._redis_url is None:
            raise NotFoundError("the deployment has no Redis before it is entered")
        return self._redis_url

    @property
    def tls_cert(self) -> Path | None:
        """The gateway's certificate; None where it does not encrypt."""
        return self._file("tls_cert", TlsSettings().tls_cert)

    @property
    def asks_for_keys(self) -> bool:
        return bool(self._settings.get("api_keys_file", Settings().api_keys_file))

    @property
    def processes(self) -> Mapping[str, Supervised]:
        """By name; each tells its `pid` and `restarts`."""
        return self._processes

    async def __aenter__(self) -> Self:
        try:
            self._tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
            self._stack.push_async_callback(self._stop)
            self._check_settings()
            self._cards = await asyncio.to_thread(self._describe)
            if self._redis_url is None:
                await self._start_redis()
            else:
                await self._check_redis(self._redis_url)
            names = [self._launch("gateway", "gateway", host=self._host, port=self._port or free_port(self._host))]
            names += self._launch_replicas()
            await self.wait_ready(*names)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        # Not given to the stack: a task group would wrap the caller's own error in an ExceptionGroup.
        await self._stack.aclose()

    async def wait_ready(self, *names: str) -> None:
        """Returns when these processes (without names: all) are ready."""
        processes = [self._process(name) for name in names or self._processes]
        waits = [
            asyncio.create_task(process.wait_ready(self._ready_timeout_s), name=f"wait for {process.name}")
            for process in processes
        ]
        try:
            # The first failure ends the wait; the others would only repeat it.
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def end_now(self) -> None:
        """SIGKILL to every process but Redis, for a stop that takes too long."""
        for name, process in self._processes.items():
            if name != "redis" and process.running:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    async def kill(self, name: str) -> bool:
        """SIGKILL; it is started again. Returns when it is dead; false where it was down."""
        return await self._process(name).kill()

    async def restart(self, name: str) -> None:
        """SIGTERM, then started again at once; returns when it is ready."""
        await self._process(name).restart()
        await self.wait_ready(name)

    async def add(self, kind: str, model: str = "") -> str:
        """Another encoder, denoiser or decoder of a model (empty: the default one); its name when it is ready."""
        if kind not in self._replicas:
            raise InvalidRequestError("kind", kind, ", ".join(self._replicas))
        if model and model not in self._models:
            raise InvalidRequestError("model", model, ", ".join(self._models))
        name = self._launch_replica(kind, model or self.models[0], self._least_used())
        await self.wait_ready(name)
        return name

    async def remove(self, name: str) -> None:
        """SIGTERM; returns when it has ended. It is not started again."""
        await self._process(name).stop()
        del self._processes[name], self._addresses[name]
        for known in (self._model_of, self._gpu_of, self._metrics):
            known.pop(name, None)

    def _check_settings(self) -> None:
        """What would otherwise be found out by a process that is started again and again."""
        check_folders(log_dir=self._log_dir, data_dir=self._data_dir)
        check_ports(self._host, port=self._port, metrics_port=self._metrics_port or 0)
        open_tracing(str(self._settings.get("traces", Settings().traces)), service="up").close()
        KeyFile(self._file("api_keys_file", Settings().api_keys_file))
        certificate_files(self.tls_cert, self._file("tls_key", TlsSettings().tls_key))

    def _file(self, name: str, of_environment: Path | None) -> Path | None:
        given = self._settings.get(name, of_environment)
        return Path(str(given)) if given else None

    def _describe(self) -> list[ModelCard]:
        """What would otherwise be found out by every process; and hashes of weights are computed once, for all."""
        known = {**ModelSettings.model_fields, "more_models": None}
        of_models: dict[str, Any] = {name: value for name, value in self._settings.items() if name in known}
        return [describe(checkpoint_from(own)) for own in GatewaySettings(**of_models).each()]

    async def _start_redis(self) -> None:
        from streamflow.cli.redis import RedisProgram, answers

        directory = self._data_dir or Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="streamflow-")))
        program = RedisProgram(directory)
        redis = Supervised("redis", program, probe=lambda: answers(program.url), on_line=self._on_line)
        self._run("redis", redis)
        await self.wait_ready("redis")
        self._redis_url = program.url
        # It has a password of its own; empty is as if it were not set.
        self._settings |= dict.fromkeys(OF_REDIS, "")
        self._addresses["redis"] = urlsplit(program.url).netloc.rpartition("@")[2]

    async def _check_redis(self, url: str) -> None:
        from streamflow.transport.redis_access import RedisAccess

        given: dict[str, Any] = {name: value for name, value in self._settings.items() if name in OF_REDIS}
        await check_redis(RedisAccess.of(Settings(redis_url=url, **given)))

    def _least_used(self) -> Gpu | None:
        if not self._gpus:
            return None
        load: defaultdict[str, float] = defaultdict(float)
        for gpu, weight in self._gpu_of.values():
            load[gpu.uuid] += weight
        return find(self._gpus, least_used([gpu.uuid for gpu in self._gpus], load))

    def _launch_replicas(self) -> list[str]:
        replicas = [(kind, model) for model in self._models for kind, n in self._replicas.items() for _ in range(n)]
        placed: Sequence[Gpu | None] = [None] * len(replicas)
        if self._gpus:
            placed = place([_WEIGHTS[kind] for kind, _ in replicas], self._gpus)
        return [self._launch_replica(*replica, gpu) for replica, gpu in zip(replicas, placed, strict=True)]

    def _launch_replica(self, kind: str, model: str, gpu: Gpu | None) -> str:
        self._numbers[kind, model] += 1
        name = f"{kind}-{self._numbers[kind, model]}"
        if model != self.models[0]:
            name = f"{model}-{name}"
        self._model_of[name] = model
        own = {**self._models[model], **({"slots": self._slots} if kind == "denoiser" else {})}
        if gpu is not None:
            self._gpu_of[name], own["gpu"] = (gpu, _WEIGHTS[kind]), gpu.uuid
        return self._launch(name, kind, host=LOOPBACK, port=free_port(), **own)

    def _launch(self, name: str, kind: str, *, host: str, port: int, **extra: object) -> str:
        settings = {**self._settings, "redis_url": self.redis_url, "host": host, "port": port, **extra}
        if self._metrics_port is not None:
            metrics_port = (self._metrics_port if kind == "gateway" else 0) or free_port(host)
            settings["metrics_port"] = metrics_port
            self._metrics[name] = f"http://{_local(host, metrics_port)}/metrics"
        address = _local(host, port)
        command = Command(
            self._commands[kind],
            environment=child_environment(settings),
            on_line=lambda line: self._on_line(name, line),
        )
        process = Supervised(
            name,
            command,
            probe=lambda: serving(address, SERVICES[kind], tls_cert=self.tls_cert if kind == "gateway" else None),
            on_line=self._on_line,
            grace_s=self._grace_s + _EXIT_S,
        )
        self._addresses[name] = address
        self._run(name, process)
        return name

    def _run(self, name: str, process: Supervised) -> None:
        self._processes[name] = process
        self._tasks.create_task(process.run(), name=f"keep {name} running")

    def _process(self, name: str) -> Supervised:
        if name not in self._processes:
            raise NotFoundError(f"there is no process {name!r}; there are {', '.join(self._processes)}")
        return self._processes[name]

    def _on_line(self, name: str, line: str) -> None:
        if name in self._processes:
            self._processes[name].last_lines.append(line)
        if self._log_dir is not None:
            with (self._log_dir / f"{name}.log").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        if self._user_on_line is not None:
            self._user_on_line(name, line)

    async def _stop(self) -> None:
        """No new requests first, then the stages, and what they all need last."""
        stages = [name for name in self._processes if name not in ("gateway", "redis")]
        for names in (["gateway"], stages, ["redis"]):
            found = [self._processes[name] for name in names if name in self._processes]
            await asyncio.gather(*(process.stop() for process in found))


def _local(host: str, port: int) -> str:
    """Where this machine reaches what listens there."""
    return join(LOOPBACK if host in ("0.0.0.0", "[::]", "::") else host, port)
