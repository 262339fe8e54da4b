"""Metrics of a gateway: its own calls, and the deployment of each model as the store shows it.

Every gateway tells the same of a deployment, so several of them are not added up: take the `max`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Histogram

from gateway.backlog import backlog_s, image_costs_s
from gateway.models import Models, Served
from streamflow.errors import BusyError, UnavailableError
from streamflow.telemetry import get_logger
from streamflow.telemetry.metrics import PREFIX, SECONDS, Family, Snapshot, counter, counters, gauge
from streamflow.transport.base import JobView, Overview
from streamflow.types import JobState, Stage, WorkerInfo

LOOK_EVERY_S = 2.0

REASONS = ("jobs", "tenant_jobs", "rate", "bytes", "tenant_bytes", "work", "late")
"""For which load is refused; see admit.lua."""

ENDS = tuple(state.value for state in JobState if state.terminal)
IMAGE_ENDS = ("done", "error", "cancelled", "deadline")
STAGES = tuple(stage.value for stage in Stage)

SEEN_S = 15.0
"""What was seen longer ago is not told: alerts and autoscalers act on what is told as on what is."""

_LOOK_S = 5.0

_log = get_logger(__name__)


@dataclass(slots=True)
class _Seen:
    """A model's deployment when it was last looked at."""

    revision: str
    overview: Overview
    workers: list[WorkerInfo]
    costs_s: dict[Stage, float] = field(default_factory=dict)


class GatewayWatch:
    """Keeps looking at the deployments, and counts what the gateway is asked.

    Args:
        counts: of this gateway alone, by name.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        metrics: CollectorRegistry,
        *,
        counts: Callable[[], dict[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counts, self._clock = counts, clock
        self._seen: dict[str, _Seen] = {}
        # Of every model; before its first look, since when one is tried.
        self._seen_at_s: dict[str, float] = {}
        about = "Calls of the gateway by how they ended, as their clients saw it"
        self._calls = Histogram(f"{PREFIX}rpc_seconds", about, ("method", "code"), registry=metrics, buckets=SECONDS)
        about = "From the admission of a job to its end, for jobs whose client was there"
        self._jobs = Histogram(f"{PREFIX}job_seconds", about, ("model", "state"), registry=metrics, buckets=SECONDS)
        metrics.register(Snapshot(self._families))

    def called(self, method: str, code: str, seconds: float) -> None:
        self._calls.labels(method, code).observe(seconds)

    def ended(self, model: str, view: JobView) -> None:
        if view.finished_at_s is not None:
            self._jobs.labels(model, view.state.value).observe(max(0.0, view.finished_at_s - view.admitted_at_s))

    async def keep_looking(self, models: Models, *, every_s: float = LOOK_EVERY_S) -> None:
        """Until it is cancelled."""
        self._seen_at_s = dict.fromkeys(models.names, self._clock())
        while True:
            await asyncio.gather(*map(self._try_to_look, models))
            await asyncio.sleep(every_s)

    async def _try_to_look(self, served: Served) -> None:
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._look(served)
        except (UnavailableError, BusyError, TimeoutError) as error:
            _log.debug("deployment not seen", model=served.card.name, reason=str(error))
        except Exception as error:
            # Whoever only watches must not end the gateway.
            _log.error("deployment cannot be read", model=served.card.name, error=error)

    async def _look(self, served: Served) -> None:
        overview, workers = await served.transport.overview(), await served.transport.workers()
        name = served.card.name
        known = self._seen[name].costs_s if name in self._seen else {}
        self._seen[name] = _Seen(served.card.revision, overview, workers, image_costs_s(workers, known=known))
        self._seen_at_s[name] = self._clock()

    def _families(self) -> Iterator[Family]:
        # A rate needs a value before the first time.
        yield from counters("gateway", {"busy_total": 0, **self._counts()}, {})
        now_s = self._clock()
        ages_s = {model: now_s - at_s for model, at_s in dict(self._seen_at_s).items()}
        about = "How long ago the gateway saw the deployment"
        ages = [((model,), age_s) for model, age_s in ages_s.items()]
        yield gauge("deployment_seen_seconds", about, ("model",), ages)
        # A family is told once, with all models in it.
        seen = {model: each for model, each in dict(self._seen).items() if ages_s[model] <= SEEN_S}
        yield from _queues(seen)
        yield from _totals({model: each.overview.totals for model, each in seen.items()})
        yield from _replicas(seen)


def _queues(seen: Mapping[str, _Seen]) -> Iterator[Family]:
    places = [
        ((model, queue.place, str(queue.priority)), queue)
        for model, each in seen.items()
        for queue in each.overview.queues
    ]
    names = ("model", "stage", "priority")
    about = "Images by where they are (waiting, or the stage) and priority"
    yield gauge("queue_images", about, names, [(of, queue.images) for of, queue in places])
    about = "How long the oldest of them has been there"
    yield gauge("queue_oldest_seconds", about, names, [(of, queue.oldest_s) for of, queue in places])
    about = "What one replica of the stage would need for all that is admitted and has not passed it"
    work = [
        ((model, stage.value), value)
        for model, each in seen.items()
        for stage, value in backlog_s(each.overview, each.costs_s).items()
    ]
    yield gauge("backlog_seconds", about, ("model", "stage"), work)
    about = "Images that were given up and are kept for a look"
    kept = [((model,), each.overview.dead_letters) for model, each in seen.items()]
    yield gauge("dead_letters", about, ("model",), kept)


def _totals(seen: Mapping[str, Mapping[str, int]]) -> Iterator[Family]:
    """Of whole deployments since their store began: each counted with the move itself, so exactly once."""

    def of(name: str) -> list[tuple[tuple[str], int]]:
        return [((model,), totals.get(name, 0)) for model, totals in seen.items()]

    def by(kind: str, labels: Sequence[str]) -> list[tuple[tuple[str, str], int]]:
        # What has not happened yet is told as 0: a rate needs a value before the first time.
        return [
            ((model, label), totals.get(f"{kind}:{label}", 0)) for model, totals in seen.items() for label in labels
        ]

    yield counter("jobs_admitted", "Requests that were admitted", ("model",), of("admitted"))
    yield counter("images_admitted", "Images of admitted requests", ("model",), of("admitted_images"))
    yield counter(
        "jobs_refused", "Requests that were refused for load, by why", ("model", "reason"), by("refused", REASONS)
    )
    yield counter("jobs_ended", "Jobs by how they ended", ("model", "state"), by("ended", ENDS))
    yield counter("images_ended", "Images by how they ended", ("model", "state"), by("images", IMAGE_ENDS))
    about = "Entries that were given to a worker again, after a failure or the end of another one"
    yield counter("redeliveries", about, ("model", "stage"), by("redelivered", STAGES))
    yield counter("images_given_up", "Images that no worker could finish", ("model", "stage"), by("given_up", STAGES))


def _replicas(seen: Mapping[str, _Seen]) -> Iterator[Family]:
    """As the registry shows them."""
    taking: dict[tuple[str, str], list[WorkerInfo]] = {}
    others: dict[tuple[str, str], int] = {}
    for model, each in seen.items():
        for stage in Stage:
            live = [worker for worker in each.workers if worker.stage is stage]
            found = [w for w in live if w.model_revision == each.revision and not w.draining]
            taking[model, stage.value], others[model, stage.value] = found, len(live) - len(found)
    names = ("model", "stage")
    about = "Replicas that take new work of the gateway's revision of the model"
    yield gauge("replicas", about, names, [(of, len(found)) for of, found in taking.items()])
    about = "Replicas that are alive and take none: they are draining, or of another revision"
    yield gauge("other_replicas", about, names, others.items())
    slots = [(of, sum(worker.slots for worker in found)) for of, found in taking.items()]
    yield gauge("deployment_slots", "Images that all replicas that take work can hold", names, slots)
