"""Metrics of the running batch."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram

from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.runner import TickRecord
from streamflow.telemetry.metrics import PREFIX, Family, Snapshot, counter

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def watch_ticks(stage: DenoiserStage, metrics: CollectorRegistry) -> None:
    """Measures every tick of the stage from its start on."""
    model = stage.card.name
    about = "Network rows of a tick, without padding"
    rows = Histogram(f"{PREFIX}tick_rows", about, ("model",), registry=metrics, buckets=_ROWS).labels(model)
    about = "How long a tick takes"
    seconds = Histogram(f"{PREFIX}tick_seconds", about, ("model",), registry=metrics, buckets=_SECONDS).labels(model)
    spent_s = {"network": 0.0, "update": 0.0, "wait": 0.0}

    def observe(tick: TickRecord) -> None:
        rows.observe(tick.rows)
        seconds.observe(tick.seconds)
        spent_s["network"] += tick.network_s
        spent_s["update"] += max(0.0, tick.seconds - tick.network_s)

    def phases() -> Iterator[Family]:
        # Up to now, not up to the last tick. Never less than was told: a tick may begin while it is read.
        spent_s["wait"] = max(spent_s["wait"], stage.waited_s)
        about = "Time of the engine's thread in steps (network), in the rest of its ticks (update), without work (wait)"
        of = [((model, phase), phase_s) for phase, phase_s in spent_s.items()]
        yield counter("tick_phase_seconds", about, ("model", "phase"), of)

    stage.on_tick = observe
    metrics.register(Snapshot(phases))
