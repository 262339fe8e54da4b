"""What a stage's process tells of its work: metrics, and a span and a log line for every entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram

from streamflow.telemetry import get_logger
from streamflow.telemetry.metrics import PREFIX, SECONDS, Family, Snapshot, counters, gauge
from streamflow.telemetry.traces import Tracing
from streamflow.transport.handling import WorkRecord
from streamflow.types import Stage, WorkerInfo

_log = get_logger(__name__)


class StageWatch:
    """Called by the worker with what became of each entry.

    Args:
        metrics: where its families go.
        model: that the replica serves.
    """

    def __init__(self, stage: Stage, metrics: CollectorRegistry, tracing: Tracing, *, model: str) -> None:
        self._stage, self._metrics, self._tracing, self._model = stage, metrics, tracing, model
        labels = ("stage", "model")
        about = "How long entries lay in the stage's stream before a replica took them"
        self._waited = Histogram(f"{PREFIX}entry_wait_seconds", about, labels, registry=metrics, buckets=SECONDS)
        about = "From taking an entry to storing what became of it, by that"
        self._worked = Histogram(
            f"{PREFIX}entry_work_seconds", about, (*labels, "outcome"), registry=metrics, buckets=SECONDS
        )
        about = "From admission to the finished picture, over all stages"
        self._image = Histogram(f"{PREFIX}image_seconds", about, ("model",), registry=metrics, buckets=SECONDS)

    def show(self, info: Callable[[], WorkerInfo]) -> None:
        """Has the replica's state and counters among the metrics, as they are when somebody asks."""
        self._metrics.register(Snapshot(lambda: _families(info())))

    def __call__(self, record: WorkRecord) -> None:
        stage = self._stage.value
        self._waited.labels(stage, self._model).observe(record.waited_s)
        self._worked.labels(stage, self._model, record.outcome).observe(record.worked_s)
        if record.image_s is not None:
            self._image.labels(self._model).observe(record.image_s)
        self._trace(record)
        _log.info(
            "worked",
            job=record.entry.ref.job_id,
            image=record.entry.ref.index,
            attempt=record.entry.attempt,
            outcome=record.outcome,
            waited_ms=round(1000 * record.waited_s),
            worked_ms=round(1000 * record.worked_s),
        )

    def _trace(self, record: WorkRecord) -> None:
        self._tracing.work(
            self._stage.value,
            traceparent=record.entry.traceparent,
            began_s=record.began_s,
            took_s=record.worked_s,
            attributes={
                "streamflow.job": record.entry.ref.job_id,
                "streamflow.image": record.entry.ref.index,
                "streamflow.attempt": record.entry.attempt,
                "streamflow.outcome": record.outcome,
                "streamflow.waited_s": round(record.waited_s, 6),
            },
            events=[(note.at_s, note.name, note.attributes) for note in record.notes],
            failed=record.outcome == "failed",
        )


def _families(info: WorkerInfo) -> Iterator[Family]:
    names, of = ("stage", "model"), (info.stage.value, info.model)
    yield gauge("slots", "Images that the replica can hold at once", names, [(of, info.slots)])
    yield gauge("slots_in_use", "Images that it holds", names, [(of, info.slots_in_use)])
    yield gauge("draining", "1 while it takes no new work", names, [(of, float(info.draining))])
    about = "What one more image costs of a replica's time, measured while it had work"
    yield gauge("image_cost_seconds", about, names, [(of, info.image_ms / 1000)])
    yield from counters(info.stage.service, info.counters, {"model": info.model})
