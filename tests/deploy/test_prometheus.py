"""The dashboard and the alert rules."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

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
    names = {check["alertname"] for test in tested for check in test["alert_rule_test"]}
    assert names <= {rule["alert"] for rule in group["rules"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize("command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]])
def test_the_alerts_come_when_they_should(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
