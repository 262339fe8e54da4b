"""The Grafana dashboard as code: `python deploy/grafana/dashboard.py` writes dashboards/streamflow.json.

What a deployment as a whole says is told by every gateway alike, so those queries take the `max` over them, for each
model; what models have, and what a process says of itself, is added up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "streamflow.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH, HEIGHT = 24, 8


@dataclass(frozen=True)
class Query:
    """PromQL, and how its lines are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A graph over time."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    about: str = ""
    stacked: bool = False


def rate(metric: str, by: str) -> str:
    return f'sum by ({by}) (rate({metric}{{model=~"$model"}}[$__rate_interval]))'


def deployment_rate(metric: str, by: str) -> str:
    """Of what all gateways tell alike."""
    return _once(f'rate({metric}{{model=~"$model"}}[$__rate_interval])', by)


def deployment(metric: str, by: str) -> str:
    """Of what all gateways tell alike."""
    return _once(f'{metric}{{model=~"$model"}}', by)


def _once(told: str, by: str) -> str:
    each = by if by == "model" else f"model, {by}"
    return f"sum by ({by}) (max by ({each}) ({told}))"


def quantile(share: float, histogram: str, by: str = "", *, of: str = '{model=~"$model"}') -> str:
    buckets = f"sum by ({', '.join(filter(None, ('le', by)))}) (rate({histogram}_bucket{of}[$__rate_interval]))"
    return f"histogram_quantile({share}, {buckets})"


def latest(metric: str, by: str) -> str:
    """The greatest."""
    return f'max by ({by}) ({metric}{{model=~"$model"}})'


ROWS: dict[str, Sequence[Panel]] = {
    "What clients see": (
        Panel(
            "Requests a second",
            [
                Query(deployment_rate("streamflow_jobs_admitted_total", "model"), "admitted, {{model}}"),
                Query(deployment_rate("streamflow_jobs_refused_total", "reason"), "refused: {{reason}}"),
            ],
            "reqps",
        ),
        Panel(
            "Images a second", [Query(deployment_rate("streamflow_images_ended_total", "state"), "{{state}}")], "ops"
        ),
        Panel("How jobs end", [Query(deployment_rate("streamflow_jobs_ended_total", "state"), "{{state}}")], "ops"),
        Panel(
            "From admission to the finished picture",
            [Query(quantile(share, "streamflow_image_seconds"), f"{share:.0%}") for share in (0.5, 0.95, 0.99)],
            "s",
        ),
        Panel(
            "Calls of the gateway, 95 %",
            [Query(quantile(0.95, "streamflow_rpc_seconds", "method", of=""), "{{method}}")],
            "s",
            "Generate and Watch last as long as their client listens.",
        ),
        Panel(
            "How calls end",
            [Query("sum by (code) (rate(streamflow_rpc_seconds_count[$__rate_interval]))", "{{code}}")],
            "reqps",
        ),
    ),
    "How much there is to do": (
        Panel(
            "Backlog",
            [Query(latest("streamflow_backlog_seconds", "model, stage"), "{{model}}: {{stage}}")],
            "s",
            "What one replica of the stage would need for all that is admitted and has not passed it.",
        ),
        Panel(
            "Images by place and priority",
            [Query(deployment("streamflow_queue_images", "stage, priority"), "{{stage}}, priority {{priority}}")],
            stacked=True,
        ),
        Panel("Age of the oldest", [Query(latest("streamflow_queue_oldest_seconds", "stage"), "{{stage}}")], "s"),
        Panel(
            "Replicas",
            [
                Query(deployment("streamflow_replicas", "stage"), "{{stage}}"),
                Query(deployment("streamflow_other_replicas", "stage"), "{{stage}}, take no new work"),
            ],
        ),
        Panel(
            "Slots in use",
            [
                Query('sum by (stage) (streamflow_slots_in_use{model=~"$model"})', "{{stage}}"),
                Query('sum by (stage) (streamflow_slots{model=~"$model"})', "{{stage}}, all"),
            ],
        ),
        Panel(
            "What an image costs",
            [Query('avg by (stage) (streamflow_image_cost_seconds{model=~"$model"} > 0)', "{{stage}}")],
            "s",
            "Of replicas that have measured it.",
        ),
    ),
    "The running batch": (
        Panel(
            "A tick",
            [Query(quantile(share, "streamflow_tick_seconds"), f"{share:.0%}") for share in (0.5, 0.95)],
            "s",
        ),
        Panel(
            "Where the engine's time goes",
            [
                Query(
                    'avg by (phase) (rate(streamflow_tick_phase_seconds_total{model=~"$model"}[$__rate_interval]))',
                    "{{phase}}",
                )
            ],
            "s",
            "Seconds a second, of each denoiser: in steps (network), in the rest of its ticks (update), idle (wait).",
            stacked=True,
        ),
        Panel(
            "Rows of a tick",
            [
                Query(
                    f"{rate('streamflow_tick_rows_sum', 'model')} / {rate('streamflow_tick_rows_count', 'model')}",
                    "{{model}}",
                )
            ],
        ),
        Panel(
            "Steps a second",
            [Query(rate("streamflow_denoiser_evaluations_total", "model"), "{{model}}")],
            "ops",
        ),
        Panel(
            "Ticks a second",
            [
                Query(rate("streamflow_denoiser_ticks_total", "model"), "all"),
                Query(rate("streamflow_denoiser_mixed_ticks_total", "model"), "with several timesteps at once"),
            ],
            "ops",
        ),
        Panel(
            "Prompt cache",
            [
                Query(rate("streamflow_encoder_prompt_cache_hits_total", "model"), "hits"),
                Query(rate("streamflow_encoder_prompt_cache_misses_total", "model"), "misses"),
            ],
            "ops",
        ),
    ),
    "The stages": (
        Panel(
            "Waiting for a replica, 95 %",
            [Query(quantile(0.95, "streamflow_entry_wait_seconds", "stage"), "{{stage}}")],
            "s",
        ),
        Panel("At work, 95 %", [Query(quantile(0.95, "streamflow_entry_work_seconds", "stage"), "{{stage}}")], "s"),
        Panel(
            "What becomes of entries",
            [Query(rate("streamflow_entry_work_seconds_count", "stage, outcome"), "{{stage}}: {{outcome}}")],
            "ops",
        ),
        Panel(
            "Taken again, and given up",
            [
                Query(deployment_rate("streamflow_redeliveries_total", "stage"), "{{stage}} again"),
                Query(deployment_rate("streamflow_images_given_up_total", "stage"), "{{stage}} given up"),
                Query(latest("streamflow_dead_letters", "model"), "dead letters, {{model}}"),
            ],
        ),
        Panel("Memory", [Query("process_resident_memory_bytes", "{{service}} {{instance}}")], "bytes"),
        Panel(
            "Processor",
            [Query("rate(process_cpu_seconds_total[$__rate_interval])", "{{service}} {{instance}}")],
            "short",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    return {
        "uid": "streamflow",
        "title": "StreamFlow",
        "tags": ["streamflow"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_models()]},
        "panels": list(_placed()),
    }


def _models() -> dict[str, Any]:
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(streamflow_jobs_admitted_total, model)", "refId": "models"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _placed() -> Iterator[dict[str, Any]]:
    """Three panels beside each other, under the title of their row."""
    top, number = 0, 1
    for title, panels in ROWS.items():
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
            "panels": [],
        }
        top, number = top + 1, number + 1
        for place, panel in enumerate(panels):
            column, line = place % 3, place // 3
            where = {"x": column * WIDTH // 3, "y": top + line * HEIGHT, "w": WIDTH // 3, "h": HEIGHT}
            yield _graph(panel, number, where)
            number += 1
        top += HEIGHT * -(-len(panels) // 3)


def _graph(panel: Panel, number: int, where: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": where,
        "targets": [
            {"refId": chr(ord("A") + k), "datasource": SOURCE, "expr": query.expr, "legendFormat": query.legend}
            for k, query in enumerate(panel.queries)
        ],
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "fillOpacity": 25 if panel.stacked else 8,
                    "stacking": {"mode": "normal" if panel.stacked else "none"},
                    "showPoints": "never",
                },
            },
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(text(), "utf-8")
