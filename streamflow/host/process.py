"""A stage as a process: loaded, warmed up, announced, working, and ended in order.

    def main() -> None:
        run_stage(StageService(Stage.DECODE, load=..., handler=..., servicer=...), StageSettings())

SIGTERM ends it: not ready, no new work, what is under way finished within the grace period or handed back, exit 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry

from streamflow.config import StageSettings, misspelled
from streamflow.errors import BusyError, InvalidRequestError, StreamFlowError, UnavailableError, first_of
from streamflow.gpus import Gpu
from streamflow.host.control import HostedStage, StageControl, StageHandler
from streamflow.host.watching import StageWatch
from streamflow.rpc.key_file import KeyFile
from streamflow.rpc.server import RpcServer, Service
from streamflow.telemetry import Told, configure_logging, get_logger
from streamflow.telemetry.metrics import registry, serving
from streamflow.telemetry.traces import open_tracing
from streamflow.transport.base import Transport
from streamflow.transport.redis_access import RedisAccess
from streamflow.transport.redis_streams import RedisTransport
from streamflow.transport.worker import StageWorker
from streamflow.types import Stage

READY_CHECK_S = 1.0
# Of the progress time-out. The rest is for what waited behind other calls before the one that hangs: when that is over
# the worker hands such entries back, and would take them again.
_HUNG_PART = 0.5

S = TypeVar("S", bound=HostedStage)
H = TypeVar("H", bound=StageHandler)

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StageService(Generic[S, H]):
    """What one of the three services is made of.

    Attributes:
        load: loads the stage; imports what is heavy.
        handler: what works on stream entries.
        servicer: the gRPC surface.
        background: runs beside the worker until the process stops.
        watch: adds metrics of its own, before the stage is entered.
        suspend: see StageWorker; None = what is unfinished when the grace period ends begins anew elsewhere.
    """

    stage: Stage
    load: Callable[[StageSettings], S]
    handler: Callable[[S, Transport, StageSettings], H]
    servicer: Callable[[S, StageControl], Service]
    background: Callable[[H, StageWorker], Coroutine[None, None, None]] | None = None
    suspend: Callable[[H], None] | None = None
    watch: Callable[[S, CollectorRegistry], None] | None = None


def run_stage(service: StageService[S, H], settings: StageSettings, gpu: Gpu | None = None) -> None:
    """Runs the service until SIGTERM or SIGINT.

    Args:
        gpu: the one that was chosen for it, for the registry.

    Raises:
        SystemExit: with 2 for a setting that cannot be used, such as the model; with 1 when the stage cannot go on. The
            log says why.
    """
    configure_logging(level=settings.log_level, log_format=settings.log_format, service=service.stage.service)
    for name, meant in misspelled().items():
        _log.warning("no setting has this name", variable=name, meant=meant)
    from streamflow.backends.runtime import resolve_device, set_threads
    from streamflow.backends.select import leave_cores

    failed: StreamFlowError | None = None
    try:
        _check(settings, service.stage)
        device = str(resolve_device(settings.device)) + (f" (GPU {gpu.number})" if gpu else "")
        set_threads(settings.threads, deterministic=settings.deterministic)
        stage = service.load(settings)
        leave_cores(stage.backend)
        stage.warm_up()
        _log.info("loaded", model=stage.card.name, revision=stage.card.revision, device=device, slots=stage.slots)
        transport = RedisTransport.of(settings, revision=stage.card.revision)
        asyncio.run(serve(service, stage, settings, transport=transport, device=device))
    except* StreamFlowError as group:
        # Raised here, or by a task of `serve`; what else went wrong beside it keeps its traceback.
        failed = first_of(group)
    if failed is not None:
        _log.error("cannot run", reason=str(failed))
        raise SystemExit(2 if isinstance(failed, InvalidRequestError) else 1) from failed


def _check(settings: StageSettings, stage: Stage) -> None:
    """Refuses what no stage can use before the minutes that loading a model may take."""
    RedisAccess.of(settings).check()
    KeyFile(settings.api_keys_file)
    open_tracing(settings.traces, service=stage.service).close()


async def serve(
    service: StageService[S, H], stage: S, settings: StageSettings, *, transport: Transport, device: str
) -> None:
    """Serves a loaded stage until SIGTERM, SIGINT or cancellation; closes the transport."""
    async with AsyncExitStack() as resources:
        resources.push_async_callback(transport.close)
        # The stages' own calls are for operators: pictures come through the streams.
        keys = await resources.enter_async_context(KeyFile(settings.api_keys_file))
        metrics, tracing = registry(), open_tracing(settings.traces, service=service.stage.service)
        resources.callback(tracing.close)
        watch = StageWatch(service.stage, metrics, tracing, model=stage.card.name)
        if service.watch is not None:
            service.watch(stage, metrics)
        await resources.enter_async_context(stage)
        handler = service.handler(stage, transport, settings)
        control = StageControl(
            service.stage,
            hosted=stage,
            handler=handler,
            transport=transport,
            settings=settings,
            device=device,
            suspend=None if service.suspend is None else partial(service.suspend, handler),
            on_worked=watch,
        )
        watch.show(control.worker.info)
        resources.enter_context(serving(metrics, host=settings.host, port=settings.metrics_port))
        services = [service.servicer(stage, control)]
        server = RpcServer(settings, services=services, keys=keys, on_drain=_ending(control))
        await resources.enter_async_context(server)
        control.address = server.address
        beside = [stage.watch(hung_after_s=_HUNG_PART * settings.progress_timeout_s)]
        if service.background is not None:
            beside.append(service.background(handler, control.worker))
        await _work(server, control, transport, beside)


async def _work(
    server: RpcServer, control: StageControl, transport: Transport, beside: Sequence[Coroutine[None, None, None]]
) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(control.worker.run(), name="stage worker")
        endless = [tasks.create_task(_keep_ready(server, control, transport), name="readiness")]
        endless += [tasks.create_task(one, name="background") for one in beside]
        await server.run_until_stopped()
        for task in endless:
            task.cancel()


async def _keep_ready(server: RpcServer, control: StageControl, transport: Transport) -> None:
    """Ready while the store takes writes and the worker is not draining."""
    told = Told()
    while True:
        try:
            await transport.ping()
        except (UnavailableError, BusyError) as error:
            if told.is_news(error):
                _log.warning("not ready", reason=str(error))
            await server.set_ready(False)
        else:
            if told.over():
                _log.info("ready again")
            await server.set_ready(not control.worker.draining)
        await asyncio.sleep(READY_CHECK_S)


def _ending(control: StageControl) -> Callable[[float], Coroutine[None, None, None]]:
    async def end(grace_s: float) -> None:
        report = await control.drain(grace_s)
        counters = dict(control.info().counters)
        _log.info("drained", finished=report.finished, handed_back=report.handed_back, counters=counters)

    return end
