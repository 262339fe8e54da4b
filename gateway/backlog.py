"""How much work each stage has before it: what replicas are scaled by. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from streamflow.transport.base import Overview
from streamflow.types import Stage, WorkerInfo

UNKNOWN_S = 1.0
"""What an image is taken to cost before any was measured: something, so that a stage without replicas gets one."""


def image_costs_s(workers: Iterable[WorkerInfo], *, known: Mapping[Stage, float]) -> dict[Stage, float]:
    """Seconds of one replica's time for an image, by stage: the mean over the replicas that have measured it.

    Args:
        known: from before, for stages without such a replica.
    """
    measured = {stage: [w.image_ms / 1000 for w in workers if w.stage is stage and w.image_ms] for stage in Stage}
    return {stage: fmean(found) if found else known.get(stage, UNKNOWN_S) for stage, found in measured.items()}


def backlog_s(overview: Overview, costs_s: Mapping[Stage, float]) -> dict[Stage, float]:
    """Seconds that one replica of each stage would need for all that is admitted and has not passed it.

    What waits counts at every stage: a stage is scaled before the work reaches it.
    """
    images = dict[str, int].fromkeys(("waiting", *Stage), 0)
    for queue in overview.queues:
        images[queue.place] = images.get(queue.place, 0) + queue.images
    ahead, found = images["waiting"], {}
    for stage in Stage:
        ahead += images[stage]
        found[stage] = ahead * costs_s[stage]
    return found
