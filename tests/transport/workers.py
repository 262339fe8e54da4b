"""Stage workers for tests, and a handler that holds what it gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from streamflow.transport.base import Transport
from streamflow.transport.handling import EntryContext, Finish, Outcome
from streamflow.transport.worker import StageWorker
from streamflow.types import Stage, WorkerInfo
from tests.transport.worlds import FAST

# Beats come every quarter of it; a busy machine must not take a live worker for a dead one.
STEADY = replace(FAST, lease_s=1.5)


def make_worker(transport: Transport, handle, *, stage=Stage.ENCODE, worker_id="w", **settings) -> StageWorker:
    info = WorkerInfo(worker_id, stage, "host:1", "shapes", "r1", "none", "cpu", slots=settings.get("capacity", 4))
    return StageWorker(transport, stage, handle, info=lambda: info, **{"capacity": 4, **settings})


@asynccontextmanager
async def running(worker: StageWorker) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(worker.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def ended(transport: Transport, job_id: str = "a") -> Callable:
    async def condition():
        view = await transport.job(job_id)
        return view if view.state.terminal else None

    return condition


class Hold:
    """A handler that holds what it gets until it is let go, and remembers all of it."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.seen: list[tuple[str, int]] = []
        self.cancelled: list[str] = []

    async def __call__(self, context: EntryContext) -> Outcome:
        self.seen.append((str(context.entry.ref), context.entry.attempt))
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(str(context.entry.ref))
            raise
        return Finish(b"picture")

    def has(self, count: int) -> Callable:
        async def condition():
            return len(self.seen) >= count

        return condition
