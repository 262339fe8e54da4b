"""The names of everything that a deployment keeps in Redis.

All share the hash tag of the deployment, so they live on one shard of a cluster and a script may touch any of them.
"""

from __future__ import annotations

import re

from streamflow.model_names import DEPLOYMENT
from streamflow.types import Stage

# What every script gets as KEYS, in the order in which scripts/common.lua names them.
SHARED = (
    *("meta", "waiting", "under_way", "open", "watch", "ended", "results", "cache", "workers", "dead", "tenants"),
    "gpus",
)


def prefix_of(deployment: str) -> str:
    """What its keys and channels begin with."""
    return f"sf:v1:{{{deployment}}}:"


class Keys:
    """Keys of one deployment; work streams are those of one model revision, so that old replicas drain in peace.

    Args:
        deployment: 1 to 40 of A-Z a-z 0-9 _ -.
    """

    def __init__(self, deployment: str, revision: str = "") -> None:
        if not re.fullmatch(DEPLOYMENT, deployment):
            raise ValueError(f"deployment: got {deployment!r}; allowed: 1 to 40 of A-Z a-z 0-9 _ -")
        self.prefix = prefix_of(deployment)
        self.revision = revision
        self.shared = tuple(self.prefix + name for name in SHARED)

    def __getattr__(self, name: str) -> str:
        if name not in SHARED:
            raise AttributeError(name)
        return self.prefix + name

    def stream(self, stage: Stage, revision: str | None = None) -> str:
        """Of the revision of these keys, unless another one is named."""
        named = self.revision if revision is None else revision
        return self.prefix + stage.value + (f":{named}" if named else "")

    def jobs(self, tenant: str) -> str:
        """A tenant's jobs by the time of their admission, so that no list walks over those of others."""
        return f"{self.prefix}jobs:{tenant}"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    def result(self, job_id: str, index: int) -> str:
        return f"{self.prefix}res:{job_id}:{index}"

    def events(self, job_id: str) -> str:
        return f"{self.prefix}ev:{job_id}"

    def blob(self, sha256: str) -> str:
        return f"{self.prefix}blob:{sha256}"

    def cached(self, key: str) -> str:
        return f"{self.prefix}cached:{key}"

    @property
    def ended_jobs(self) -> str:
        """Where jobs are told of that end while they are being worked on."""
        return f"{self.prefix}ended_jobs"

    @property
    def preview(self) -> str:
        return f"{self.prefix}preview"
