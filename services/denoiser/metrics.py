"""Metrics of the running batch."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.runner import TickRecord
from streamflow.telemetry.metrics import PREFIX

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def watch_ticks(stage: DenoiserStage, metrics: CollectorRegistry) -> None:
    """Measures every tick of the stage from its start on."""
    model = stage.card.name
    about = "Network rows of a tick, without padding"
    rows = Histogram(f"{PREFIX}tick_rows", about, ("model",), registry=metrics, buckets=_ROWS).labels(model)
    about = "How long a tick takes"
    seconds = Histogram(f"{PREFIX}tick_seconds", about, ("model",), registry=metrics, buckets=_SECONDS).labels(model)
    about = "Time of the engine's thread in steps (network), in the rest of its ticks (update), without work (wait)"
    phases = Counter(f"{PREFIX}tick_phase_seconds", about, ("model", "phase"), registry=metrics)
    network, update, wait = (phases.labels(model, phase) for phase in ("network", "update", "wait"))

    def observe(tick: TickRecord) -> None:
        rows.observe(tick.rows)
        seconds.observe(tick.seconds)
        network.inc(tick.network_s)
        update.inc(max(0.0, tick.seconds - tick.network_s))
        wait.inc(tick.waited_s)

    stage.on_tick = observe
