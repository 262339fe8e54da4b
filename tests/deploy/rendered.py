"""deploy/kubernetes as a cluster would get it: rendered by Kustomize itself, and read as Kubernetes reads it."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]


def builder() -> list[str]:
    """The command that renders a folder. Without one the test is skipped, but on CI it fails."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            return command
    reason = "needs kubectl or kustomize on the PATH: what they render is what is looked at"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@cache
def render(base: str, *components: str) -> list[Object]:
    """A folder of deploy/kubernetes, with components on top."""
    if not components:
        return build(str(FOLDER / base))
    return render_on(base, {"components": [f"components/{name}" for name in components]})


def render_on(base: str, kustomization: Object) -> list[Object]:
    """What an operator's own overlay makes of a folder; its components are folders of deploy/kubernetes."""
    with TemporaryDirectory() as folder:

        def relative(name: str) -> str:
            # Kustomize takes no absolute paths.
            return os.path.relpath(FOLDER / name, Path(folder).resolve())

        components = [relative(name) for name in kustomization.get("components", ())]
        whole = {**kustomization, "resources": [relative(base)], "components": components}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(whole))
        return build(folder)


def build(folder: str) -> list[Object]:
    """A folder anywhere."""
    result = subprocess.run([*builder(), folder], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def of_kind(objects: Iterable[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def named(objects: Iterable[Object], kind: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in of_kind(objects, kind)}


def deployments(objects: Iterable[Object]) -> dict[str, Object]:
    """By component: gateway, encoder ..."""
    return {each["metadata"]["labels"][COMPONENT]: each for each in of_kind(objects, "Deployment")}


def pod_of(deployment: Object) -> Object:
    pod: Object = deployment["spec"]["template"]["spec"]
    return pod


def server_of(deployment: Object) -> Object:
    container: Object
    [container] = pod_of(deployment)["containers"]
    return container


def labels_of(deployment: Object) -> dict[str, str]:
    labels: dict[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
    return labels


def environment(
    objects: Iterable[Object], deployment: Object, secrets: Mapping[tuple[str, str], str]
) -> dict[str, str]:
    """What the container's environment says: its ConfigMaps in order, its own variables over them."""
    maps, container = named(objects, "ConfigMap"), server_of(deployment)
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values.update(maps[source["configMapRef"]["name"]]["data"])
    for variable in container.get("env", ()):
        if "value" in variable:
            values[variable["name"]] = variable["value"]
        else:
            reference = variable["valueFrom"]["secretKeyRef"]
            values[variable["name"]] = secrets[reference["name"], reference["key"]]
    return values


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    assert set(selector) <= {"matchLabels"}, f"{selector} has more than this reads"
    return selector.get("matchLabels", {}).items() <= labels.items()


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection: a pod and its namespace by their labels, or only an address."""

    address: str = "203.0.113.9"
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: Mapping[str, str] | None = None

    def is_one_of(self, allowed: Object) -> bool:
        if "ipBlock" in allowed:
            block = allowed["ipBlock"]
            assert set(block) == {"cidr"}
            return ipaddress.ip_address(self.address) in ipaddress.ip_network(block["cidr"])
        # Without a namespace selector it is the policy's own namespace, in which no peer here is.
        return (
            self.namespace is not None
            and "namespaceSelector" in allowed
            and selects(allowed["namespaceSelector"], self.namespace)
            and selects(allowed.get("podSelector", {}), self.labels)
        )


def allowed(
    policies: Iterable[Object], labels: Mapping[str, str], direction: str, port: int, protocol: str, peer: Peer
) -> bool:
    """Whether NetworkPolicies let a pod of these labels be called by a peer (Ingress), or call it (Egress)."""
    ours = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], labels)
    ]
    return not ours or any(_lets(rule, direction, port, protocol, peer) for rule in _rules(ours, direction))


def _rules(specs: Iterable[Object], direction: str) -> Iterator[Object]:
    for spec in specs:
        yield from spec.get(direction.lower(), ())


def _lets(rule: Object, direction: str, port: int, protocol: str, peer: Peer) -> bool:
    peers = rule.get("from" if direction == "Ingress" else "to")
    ports = rule.get("ports")
    return (peers is None or any(map(peer.is_one_of, peers))) and (
        ports is None or any((each["port"], each["protocol"]) == (port, protocol) for each in ports)
    )
