"""Who may talk to whom: the NetworkPolicies as a table, in which everything that is not listed is refused."""

from __future__ import annotations

import re
from itertools import product

import pytest
import yaml

from tests.deploy.rendered import (
    FOLDER,
    Object,
    Peer,
    allowed,
    deployments,
    labels_of,
    of_kind,
    render,
    render_on,
    server_of,
)

TARGETS = [("overlays/cpu",), ("overlays/gpu-autoscaled",)]
HERE = {"kubernetes.io/metadata.name": "streamflow"}
OURS = {"app.kubernetes.io/name": "streamflow"}
PEERS = {
    "client outside": Peer(),
    "metadata service": Peer("169.254.169.254"),
    "pod of another namespace": Peer("10.1.0.1", {"app": "shop"}, {"kubernetes.io/metadata.name": "shop"}),
    "our gateway": Peer("10.1.0.2", {**OURS, "app.kubernetes.io/component": "gateway"}, HERE),
    "our denoiser": Peer("10.1.0.3", {**OURS, "app.kubernetes.io/component": "denoiser"}, HERE),
    "Prometheus": Peer(
        "10.1.0.4", {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"}
    ),
    "Grafana": Peer("10.1.0.5", {"app.kubernetes.io/name": "grafana"}, {"kubernetes.io/metadata.name": "monitoring"}),
    "another's Prometheus": Peer(
        "10.1.0.6", {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "shop"}
    ),
    "DNS": Peer("10.1.0.7", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"}),
    "DNS on the node": Peer("169.254.20.10"),
    "another of the system": Peer("10.1.0.8", {"k8s-app": "proxy"}, {"kubernetes.io/metadata.name": "kube-system"}),
}
DNS = {"DNS", "DNS on the node"}
# Ports that somebody might think of, besides those of the containers.
OTHERS = (22, 53, 80, 443, 4317, 6379, 6380, 8080)


@pytest.fixture(params=TARGETS, ids=" + ".join)
def target(request: pytest.FixtureRequest) -> list[Object]:
    return render(*request.param)


def test_only_clients_and_prometheus_come_in(target):
    policies, found = of_kind(target, "NetworkPolicy"), deployments(target)
    ports = {port["containerPort"] for each in found.values() for port in server_of(each)["ports"]} | set(OTHERS)
    for (name, deployment), port, (peer_name, peer) in product(found.items(), ports, PEERS.items()):
        expected = (name == "gateway" and port == 50051) or (peer_name == "Prometheus" and port == 9464)
        got = allowed(policies, labels_of(deployment), "Ingress", port, "TCP", peer)
        assert got == expected, f"{peer_name} to {name}:{port}"
        assert not allowed(policies, labels_of(deployment), "Ingress", port, "UDP", peer)


def test_only_redis_and_names_are_reached(target):
    policies, found = of_kind(target, "NetworkPolicy"), deployments(target)
    ports = {port["containerPort"] for each in found.values() for port in server_of(each)["ports"]} | set(OTHERS)
    for deployment, port, (name, peer) in product(found.values(), ports, PEERS.items()):
        dns = port == 53 and name in DNS
        # Where Redis is, the base cannot know.
        assert allowed(policies, labels_of(deployment), "Egress", port, "TCP", peer) == (port == 6379 or dns), name
        assert allowed(policies, labels_of(deployment), "Egress", port, "UDP", peer) == dns, name


def test_others_in_the_namespace_are_left_alone(target):
    for direction in ("Ingress", "Egress"):
        assert allowed(of_kind(target, "NetworkPolicy"), {"app": "redis"}, direction, 6379, "TCP", Peer())


def test_the_readmes_patch_narrows_redis_to_its_address():
    [text] = re.findall(r"```yaml\n(patches:.*?)```", (FOLDER / "README.md").read_text("utf-8"), re.DOTALL)
    objects = render_on("overlays/cpu", yaml.safe_load(text))
    policies, denoiser = of_kind(objects, "NetworkPolicy"), deployments(objects)["denoiser"]
    for address, expected in (("10.20.30.40", True), ("10.20.30.41", False)):
        assert allowed(policies, labels_of(denoiser), "Egress", 6379, "TCP", Peer(address)) == expected
    assert allowed(policies, labels_of(denoiser), "Egress", 53, "UDP", PEERS["DNS"])


def test_the_policies_agree_with_the_ports_of_the_containers(target):
    ports = {port["name"]: port["containerPort"] for port in server_of(deployments(target)["gateway"])["ports"]}
    assert (ports["grpc"], ports["metrics"]) == (50051, 9464)
