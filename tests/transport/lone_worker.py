"""A worker as a process of its own: `python -m tests.transport.lone_worker <url> <deployment> <worker id> <how>`.

`dies` kills itself with its first entry in hand, as a crash in native code would; `hangs` prints a line and waits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from streamflow.transport.handling import EntryContext, Outcome
from streamflow.transport.redis_streams import RedisTransport
from streamflow.transport.worker import StageWorker
from streamflow.types import Stage, WorkerInfo
from tests.transport.worlds import FAST


async def main(url: str, deployment: str, worker_id: str, how: str) -> None:
    async def handle(context: EntryContext) -> Outcome:
        print(context.entry.ref, context.entry.attempt, flush=True)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.Event().wait()
        raise AssertionError

    transport = RedisTransport.from_url(url, deployment=deployment, policy=FAST)
    info = WorkerInfo(worker_id, Stage.ENCODE, "", "shapes", "r1", "none", "cpu", slots=4)
    worker = StageWorker(transport, Stage.ENCODE, handle, info=lambda: info, capacity=4)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: asyncio.ensure_future(worker.drain(0.1)))
    await worker.run()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
