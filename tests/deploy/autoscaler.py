"""A stage under the HorizontalPodAutoscaler, second by second: what KEDA's settings make of a load.

The rules are those of the autoscaler's documentation: every 15 s it wants the value over the target, rounded up; of
what it wanted within the stabilization window it takes the least for more replicas and the most for fewer; policies
bound the change within their period, the most generous one decides. Work is a fluid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SYNC_S = 15


@dataclass(frozen=True)
class Course:
    """What happened: replicas and the wait that a request met (backlog over running replicas), for every second."""

    replicas: list[int]
    wait_s: list[float]

    def changes(self, sign: int) -> int:
        """How often there became more (1) or fewer (-1)."""
        return sum((after - before) * sign > 0 for before, after in zip(self.replicas, self.replicas[1:], strict=False))


def course(spec: dict[str, Any], load: Callable[[int], float], *, start_s: int, seconds: int) -> Course:
    """A ScaledObject's course.

    Args:
        load: the work that arrives in a second, in seconds of one replica: 2.5 needs two and a half replicas.
        start_s: how long a new replica takes until it works.
    """
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    threshold = float(spec["triggers"][0]["metadata"]["threshold"])
    least, most = spec["minReplicaCount"], spec["maxReplicaCount"]
    replicas, wanted, waits = [least], [(0, least)], [0.0]
    started, backlog = [-start_s] * least, 0.0
    for now in range(1, seconds):
        working = sum(now - since >= start_s for since in started)
        backlog = max(0.0, backlog + load(now) - working)
        count = replicas[-1]
        if now % SYNC_S == 0:
            wanted.append((now, min(most, max(least, math.ceil(backlog / threshold)))))
            count = _step(count, now, wanted, replicas, behavior)
        started = started[:count] + [now] * (count - len(started))
        replicas.append(count)
        waits.append(backlog / max(1, working))
    return Course(replicas, waits)


def _step(count: int, now: int, wanted: list[tuple[int, int]], replicas: list[int], behavior: dict[str, Any]) -> int:
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    more = min(want for at, want in wanted if now - at <= up["stabilizationWindowSeconds"])
    fewer = max(want for at, want in wanted if now - at <= down["stabilizationWindowSeconds"])
    if more > count:
        return min(more, max(_bound(policy, now, replicas, 1) for policy in up["policies"]))
    if fewer < count:
        return max(fewer, min(_bound(policy, now, replicas, -1) for policy in down["policies"]))
    return count


def _bound(policy: dict[str, Any], now: int, replicas: list[int], sign: int) -> int:
    """As far as a policy lets the number go, from what it was when its period began."""
    was = replicas[max(0, now - policy["periodSeconds"])]
    change = policy["value"] if policy["type"] == "Pods" else math.ceil(was * policy["value"] / 100)
    return int(was + sign * change)
