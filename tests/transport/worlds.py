"""One way to open a transport, in memory and on a real Redis."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from streamflow.transport.base import Entry, Limits, NewJob, Transport
from streamflow.transport.embedded import EmbeddedRedis, find_redis_server, redis_version
from streamflow.transport.memory import MemoryTransport
from streamflow.transport.policy import Policy
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Stage, WorkerInfo

ENCODE, DENOISE, DECODE = Stage.ENCODE, Stage.DENOISE, Stage.DECODE
QUIET = {"waiting": 0, "encode": 0, "denoise": 0, "decode": 0}
"""The backlog while there is nothing to do."""
FAST = Policy(lease_s=0.5, watch_grace_s=0.5, reap_gap_s=60.0, retry_s=0.0)


def new_job(job_id: str = "a", **fields: object) -> NewJob:
    given = {"id": job_id, "digest": f"digest of {job_id}", "spec": b"\x00spec", "num_images": 1, **fields}
    return NewJob(**given)  # type: ignore[arg-type]


def denoiser(worker_id: str = "gpu", *, slots: int, **fields: object) -> WorkerInfo:
    return WorkerInfo(worker_id, DENOISE, "host:1", "shapes", "r1", "torch", "cpu", slots, **fields)  # type: ignore[arg-type]


async def take(transport: Transport, stage: Stage, worker_id: str = "w", count: int = 1) -> list[Entry]:
    """Entries that are there now."""
    return await transport.read(stage, worker_id, count, block_s=0)


def redis_binary(version: str) -> Path:
    for binary in find_redis_server():
        if redis_version(binary).startswith(version + "."):
            return binary
    pytest.skip(f"no redis-server {version} is installed")


@dataclass
class World:
    """One deployment; `open` gives what a further process would use (in memory: always the same object)."""

    deployment: str
    server: EmbeddedRedis | None
    _opened: list[Transport] = field(default_factory=list)

    def open(self, *, policy: Policy = FAST, limits: Limits | None = None) -> Transport:
        if self.server is not None:
            redis = RedisTransport.from_url(self.server.url, deployment=self.deployment, policy=policy, limits=limits)
            self._opened.append(redis)
        elif not self._opened:
            self._opened.append(MemoryTransport(policy=policy, limits=limits))
        return self._opened[-1]

    async def close(self) -> None:
        for transport in self._opened:
            await transport.close()


async def run_through(transport: Transport, count: int = 1, *, result: bytes = b"picture") -> None:
    """Images that are there or are released meanwhile, one by one through all three stages."""
    for _ in range(count):
        for stage, to in ((ENCODE, DENOISE), (DENOISE, DECODE)):
            [entry] = await take(transport, stage)
            assert await transport.advance(entry, to, {"latents": b"x" * 1000})
        [entry] = await take(transport, DECODE)
        assert await transport.finish(entry, result)
