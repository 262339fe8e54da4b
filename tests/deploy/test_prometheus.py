"""The dashboard and the alert rules."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def test_the_dashboard_is_what_its_code_makes() -> None:
    code = runpy.run_path(str(DEPLOY / "grafana" / "dashboard.py"))
    made = (DEPLOY / "grafana" / "dashboards" / "streamflow.json").read_text("utf-8")
    assert made == code["text"](), "run: python deploy/grafana/dashboard.py"
    places = [panel["gridPos"] for panel in code["dashboard"]()["panels"]]
    covered = [
        (place["x"] + x, place["y"] + y) for place in places for x in range(place["w"]) for y in range(place["h"])
    ]
    assert len(covered) == len(set(covered)), "panels lie over each other"


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]:
        assert set(rule["annotations"]) == {"summary", "do"}
        assert rule["labels"]["severity"] in ("page", "warn")
    tested = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text("utf-8"))["tests"]
    fired = {check["alertname"] for test in tested for check in test["alert_rule_test"] if check["exp_alerts"]}
    names = {rule["alert"] for rule in group["rules"]}
    assert fired == names
    runbook = (DEPLOY.parent / "docs" / "operations.md").read_text("utf-8").partition("## When an alert comes")[2]
    told = re.findall(r"^\| ([A-Z][\w, ]+) \|", runbook, re.MULTILINE)
    assert {f"StreamFlow{name}" for line in told for name in line.split(", ")} == names


@needs_promtool
@pytest.mark.parametrize("command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]])
def test_the_alerts_come_when_they_should(command: list[str]) -> None:
    promtool(*command, folder=DEPLOY / "prometheus")


def promtool(*command: str, folder: Path) -> None:
    done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def series(name: str, rate: int, **labels: str) -> dict[str, str]:
    """One that grows by so much a second; 0 = it stays 5."""
    said = ", ".join(f'{label}="{value}"' for label, value in labels.items())
    return {"series": f"{name}{{{said}}}", "values": f"0+{10 * rate}x60" if rate else "5x60"}


@needs_promtool
def test_the_dashboard_adds_models_up_and_not_what_gateways_tell_alike(tmp_path: Path) -> None:
    """Two models, the first with 1 and the second with 2 of everything, seen by two gateways."""
    given = [
        series(f"streamflow_{name}", rate, model=model, instance=gateway, **labels)
        for model, rate in (("shapes", 1), ("rings", 2))
        for gateway in ("a", "b")
        for name, labels in (
            ("images_ended_total", {"state": "done"}),
            ("jobs_admitted_total", {}),
            ("redeliveries_total", {"stage": "decode"}),
        )
    ]
    given += [
        series("streamflow_replicas", 0, model=model, instance=gateway, stage="decode")
        for model in ("shapes", "rings")
        for gateway in ("a", "b")
    ]
    # Pictures of one model take a second, those of the other one ten.
    given += [
        series("streamflow_image_seconds_bucket", rate, model=model, instance="d", le=le)
        for model, rates in (("shapes", (1, 1, 1)), ("rings", (0, 1, 1)))
        for le, rate in zip(("1", "10", "+Inf"), rates, strict=True)
    ]
    # Of two denoisers one never has work.
    given += [
        series("streamflow_tick_phase_seconds_total", 1, model="shapes", instance=instance, phase=phase)
        for instance, phase in (("d", "network"), ("e", "wait"))
    ]
    given += [
        series("streamflow_tick_phase_seconds_total", 0, model="shapes", instance=instance, phase=phase)
        for instance, phase in (("e", "network"), ("d", "wait"))
    ]
    checks = [
        *check("Images a second", ".*", {'{state="done"}': 3}),
        *check("Images a second", "shapes", {'{state="done"}': 1}),
        *check("Requests a second", ".*", {'{model="shapes"}': 1, '{model="rings"}': 2}),
        *check("Taken again, and given up", ".*", {'{stage="decode"}': 3}),
        *check("Replicas", ".*", {'{stage="decode"}': 10}),
        *check("Replicas", "rings", {'{stage="decode"}': 5}),
        *check("From admission to the finished picture", "shapes", {"{}": 0.5}),
        *check("Where the engine's time goes", ".*", {'{phase="network"}': 0.5, '{phase="wait"}': 0.5}),
    ]
    test = {"interval": "10s", "input_series": given, "promql_expr_test": checks}
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    promtool("test", "rules", "test.yml", folder=tmp_path)


def check(title: str, models: str, values: dict[str, float]) -> list[dict[str, object]]:
    """That a panel's first query gives this, by labels."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "streamflow.json").read_text("utf-8"))
    (panel,) = [panel for panel in dashboard["panels"] if panel["title"] == title]
    expr = panel["targets"][0]["expr"].replace("$model", models).replace("$__rate_interval", "1m")
    return [
        {
            "expr": expr,
            "eval_time": "5m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in values.items()],
        }
    ]
