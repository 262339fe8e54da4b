"""components/keda and components/prometheus: what scales, by which figure, and how fast."""

from __future__ import annotations

import re

import kubernetes_validate
import pytest

from streamflow.types import Stage
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


def test_replicas_come_at_once_and_leave_one_by_one(target):
    for name, thing in named(target, "ScaledObject").items():
        behavior = thing["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
        down = behavior["scaleDown"]
        [policy] = down["policies"]
        assert (policy["type"], policy["value"]) == ("Pods", 1)
        # A denoiser is the dearest to start.
        window_s, every_s = (600, 120) if name == "streamflow-denoiser" else (300, 60)
        assert down["stabilizationWindowSeconds"] >= window_s
        assert policy["periodSeconds"] >= every_s


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
