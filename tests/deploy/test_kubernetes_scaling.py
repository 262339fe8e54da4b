"""components/keda and components/prometheus: what scales, by which figure, and how fast."""

from __future__ import annotations

import re
from copy import deepcopy
from math import ceil

import kubernetes_validate
import pytest

from streamflow.types import Stage
from tests.deploy.autoscaler import course
from tests.deploy.rendered import (
    Object,
    deployments,
    environment,
    labels_of,
    named,
    of_kind,
    render,
    selects,
    server_of,
)

TARGETS = [("overlays/cpu", "prometheus", "keda"), ("overlays/gpu-autoscaled",)]
QUERY = re.compile(r'max\(streamflow_backlog_seconds\{namespace="([^"]*)",model="([^"]*)",stage="([^"]*)"\}\)')
SECRETS = {("streamflow-redis", "url"): ""}


@pytest.fixture(params=TARGETS, ids=" + ".join)
def target(request: pytest.FixtureRequest) -> list[Object]:
    return render(*request.param)


def test_each_stage_is_scaled_by_its_own_backlog_of_this_deployment(target):
    scaled, found = named(target, "ScaledObject"), deployments(target)
    assert len(scaled) == len(Stage)
    for stage in Stage:
        deployment = found[stage.service]
        values = environment(target, deployment, SECRETS)
        [trigger] = scaled[deployment["metadata"]["name"]]["spec"]["triggers"]
        asked = QUERY.fullmatch(trigger["metadata"]["query"])
        assert asked is not None, trigger
        assert asked.groups() == (deployment["metadata"]["namespace"], values["STREAMFLOW_MODEL_NAME"], stage.value)
        # The figure is what one replica would take: shared out between replicas, not compared as a whole.
        assert trigger["metricType"] == "AverageValue"
        assert float(trigger["metadata"]["threshold"]) > 0


def test_what_is_scaled_has_no_number_of_its_own(target):
    for name, deployment in deployments(target).items():
        assert ("replicas" in deployment["spec"]) == (name == "gateway")
    for thing in of_kind(target, "ScaledObject"):
        assert thing["spec"]["scaleTargetRef"]["name"] in named(target, "Deployment")


def test_silence_is_not_an_empty_queue(target):
    for thing in of_kind(target, "ScaledObject"):
        [trigger] = thing["spec"]["triggers"]
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert thing["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"
        least, most = thing["spec"]["minReplicaCount"], thing["spec"]["maxReplicaCount"]
        assert 1 <= least == thing["spec"]["fallback"]["replicas"] < most


# Seconds until a new replica works, and how many may leave in an hour of steady load: as many have to be started again.
STARTS = {"streamflow-encoder": (30, 10), "streamflow-denoiser": (60, 5), "streamflow-decoder": (30, 10)}
HOUR_S = 3600


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("load", [0.5, 1.5, 2.5, 3.5])
def test_a_steady_load_keeps_its_replicas(target, name, load):
    start_s, most = STARTS[name]
    spec = named(target, "ScaledObject")[name]["spec"]
    hours, settled = 4, slice(2 * HOUR_S, None)
    found = course(spec, lambda now: load, start_s=start_s, seconds=hours * HOUR_S)
    assert found.changes(-1) <= most * hours
    # At first it is more, for what has piled up until the first ones work.
    assert max(found.replicas[settled]) <= max(ceil(load), spec["minReplicaCount"]) + 2
    # Nobody waits much longer than it takes to see what is missing, and to start it.
    threshold_s = float(spec["triggers"][0]["metadata"]["threshold"])
    assert max(found.wait_s[settled]) <= threshold_s + start_s


def test_without_the_long_way_down_replicas_come_and_go(target):
    spec = deepcopy(named(target, "ScaledObject")["streamflow-denoiser"]["spec"])
    spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"] = {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
    }
    assert course(spec, lambda now: 2.5, start_s=60, seconds=HOUR_S).changes(-1) > 20


@pytest.mark.parametrize("name", STARTS)
def test_a_burst_is_soon_over(target, name):
    """Four minutes of work for one replica arrive at once."""
    spec, (start_s, _) = named(target, "ScaledObject")[name]["spec"], STARTS[name]
    found = course(spec, lambda now: 240.0 if now == HOUR_S else 0.0, start_s=start_s, seconds=2 * HOUR_S)
    assert next(now for now in range(HOUR_S, 2 * HOUR_S) if found.wait_s[now] == 0) - HOUR_S <= 150
    assert found.replicas[HOUR_S - 1] == found.replicas[-1] == spec["minReplicaCount"]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_the_autoscaler_that_keda_makes_of_it_is_valid(target, version):
    for thing in of_kind(target, "ScaledObject"):
        spec = thing["spec"]
        autoscaler = {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": f"keda-hpa-{thing['metadata']['name']}"},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", **spec["scaleTargetRef"]},
                "minReplicas": spec["minReplicaCount"],
                "maxReplicas": spec["maxReplicaCount"],
                "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            },
        }
        kubernetes_validate.validate(autoscaler, version, strict=True)


def test_prometheus_scrapes_every_process(target):
    [monitor] = of_kind(target, "PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for deployment in deployments(target).values():
        assert selects(monitor["spec"]["selector"], labels_of(deployment))
        [port] = [each for each in server_of(deployment)["ports"] if each["name"] == endpoint["port"]]
        assert str(port["containerPort"]) == environment(target, deployment, SECRETS)["STREAMFLOW_METRICS_PORT"]
    assert endpoint["path"] == "/metrics"
