"""One replica seen from outside: its entry in the registry, its status, its drain."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Protocol, Self

import grpc.aio

from streamflow.backends.cost import Cost
from streamflow.config import StageSettings
from streamflow.errors import InvalidRequestError, UnavailableError
from streamflow.rpc.convert import worker_to_pb
from streamflow.rpc.errors import rpc_errors
from streamflow.transport.base import Transport
from streamflow.transport.handling import EntryContext, Outcome, WorkRecord
from streamflow.transport.worker import DrainReport, StageWorker
from streamflow.types import ModelCard, SlotView, Stage, WorkerInfo
from streamflow.v1 import types_pb2

MAX_GRACE_S = 3600.0


class HostedStage(Protocol):
    """What a process needs of the stage that it hosts."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def backend(self) -> str: ...

    @property
    def slots(self) -> int: ...

    @property
    def cost(self) -> Cost | None:
        """Of a network call, where it was measured."""

    @property
    def row_counts(self) -> tuple[int, ...]:
        """To which network calls are padded."""

    @property
    def counters(self) -> Mapping[str, int]: ...

    @property
    def work(self) -> tuple[SlotView, ...]:
        """What its slots hold, where it knows more of them than how many are in use."""

    def warm_up(self) -> None: ...

    async def watch(self, *, hung_after_s: float) -> None:
        """Returns never. Raises UnavailableError when it can do no more work: only a new process helps then.

        Args:
            hung_after_s: what one network call may take.
        """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...


class StageHandler(Protocol):
    """What works on the entries of a stage's stream."""

    @property
    def counters(self) -> Mapping[str, int]: ...

    async def __call__(self, context: EntryContext) -> Outcome: ...


class StageControl:
    """Owns the replica's worker and speaks for it.

    Args:
        stage: which of the three.
        hosted, handler: what does the work.
        device: where its networks are.
        suspend, on_worked: see StageWorker.

    Attributes:
        address: `host:port` of its gRPC surface; set once it is bound.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        hosted: HostedStage,
        handler: StageHandler,
        transport: Transport,
        settings: StageSettings,
        device: str,
        suspend: Callable[[], None] | None = None,
        on_worked: Callable[[WorkRecord], None] | None = None,
    ) -> None:
        self.address = ""
        self._stage, self._hosted, self._handler, self._transport = stage, hosted, handler, transport
        self._device, self._default_grace_s = device, settings.drain_grace_s
        self._worker_id = f"{stage.service}-{secrets.token_hex(4)}"
        self._started_at_s = time.time()
        self.worker = StageWorker(
            transport,
            stage,
            handler,
            info=self.info,
            capacity=hosted.slots,
            progress_timeout_s=settings.progress_timeout_s,
            suspend=suspend,
            on_worked=on_worked,
        )

    def info(self) -> WorkerInfo:
        """The replica as the registry shows it."""
        card, cost = self._hosted.card, self._hosted.cost
        return WorkerInfo(
            worker_id=self._worker_id,
            stage=self._stage,
            address=self.address,
            model=card.name,
            model_revision=card.revision,
            backend=self._hosted.backend,
            device=self._device,
            slots=self._hosted.slots,
            call_ms=1000 * cost.c0_s if cost else 0.0,
            row_ms=1000 * cost.c1_s if cost else 0.0,
            row_counts=self._hosted.row_counts,
            started_at_s=self._started_at_s,
            counters={**self._hosted.counters, **self._handler.counters},
            work=self._hosted.work,
        )

    def check_open(self) -> None:
        """Raises UnavailableError once the drain began."""
        if self.worker.draining:
            raise UnavailableError(f"this {self._stage.service} is draining; call another replica")

    async def status(self) -> types_pb2.StageStatus:
        """Raises UnavailableError when the backlog cannot be read."""
        backlog = (await self._transport.backlog()).get(self._stage.value, 0)
        return worker_to_pb(self.worker.info(), backlog=backlog)

    async def drain(self, grace_s: float = 0.0) -> DrainReport:
        """Args: grace_s: how long unfinished work may go on before it is handed back; 0 = the setting's."""
        return await self.worker.drain(grace_s or self._default_grace_s)


class ControlServicer:
    """The methods that all three services have; a servicer derives from this and from its generated class."""

    def __init__(self, control: StageControl) -> None:
        self._control = control

    async def Status(
        self,
        request: types_pb2.StatusRequest,
        context: grpc.aio.ServicerContext[types_pb2.StatusRequest, types_pb2.StageStatus],
    ) -> types_pb2.StageStatus:
        async with rpc_errors(context):
            return await self._control.status()
        raise AssertionError("abort returned")

    async def Drain(
        self,
        request: types_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[types_pb2.DrainRequest, types_pb2.DrainResponse],
    ) -> types_pb2.DrainResponse:
        async with rpc_errors(context):
            if not 0 <= request.grace_s <= MAX_GRACE_S:
                raise InvalidRequestError("grace_s", request.grace_s, f"0 to {MAX_GRACE_S:g} seconds")
            report = await self._control.drain(request.grace_s)
            return types_pb2.DrainResponse(finished=report.finished, handed_back=report.handed_back)
        raise AssertionError("abort returned")
