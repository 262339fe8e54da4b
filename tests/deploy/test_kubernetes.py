"""What deploy/kubernetes asks of a cluster: valid, hardened, and in agreement with the code and the Dockerfiles.

Nothing here runs in a cluster.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from streamflow.cli.acl_files import users_of
from streamflow.config import GatewaySettings, Settings, StageSettings
from streamflow.rpc.server import LIVENESS
from streamflow.v1 import decoder_pb2, denoiser_pb2, encoder_pb2, gateway_pb2
from tests.deploy.rendered import (
    COMPONENT,
    FOLDER,
    ROOT,
    Object,
    build,
    deployments,
    environment,
    labels_of,
    named,
    of_kind,
    pod_of,
    render,
    selects,
    server_of,
)

OVERLAYS = [("overlays/cpu",), ("overlays/gpu",), ("overlays/gpu-autoscaled",)]
COMPONENTS = [
    ("overlays/cpu", "api-keys"),
    ("overlays/cpu", "tls"),
    ("overlays/cpu", "prometheus", "keda"),
    ("overlays/cpu", "api-keys", "tls", "prometheus"),
    ("overlays/cpu", "redis-users", "redis-tls"),
    ("overlays/gpu", "redis-users", "redis-tls"),
]
ALL = [("base",), *OVERLAYS, *COMPONENTS]
NAMES = {"gateway": "Gateway", "encoder": "TextEncoder", "denoiser": "Denoiser", "decoder": "Decoder"}
FILES = {"gateway": gateway_pb2, "encoder": encoder_pb2, "denoiser": denoiser_pb2, "decoder": decoder_pb2}
STAGES = ("encoder", "denoiser", "decoder")
DOCKERFILES = {
    "gateway": "gateway/Dockerfile",
    **{stage: f"services/{stage}/Dockerfile" for stage in STAGES},
}
KINDS: dict[str, type[Settings]] = {"gateway": GatewaySettings, **dict.fromkeys(STAGES, StageSettings)}
# The oldest version that the README names, and the newest that the validator knows.
VERSIONS = ("1.30", "1.37")
SECRETS = {("streamflow-redis", "url"): "redis://127.0.0.1:6379/0"}
# A server cuts calls so long after the grace period (rpc/server.py). With torch in it a process took up to 20 s more to
# end on two busy cores.
CUT_S, EXIT_S = 2.0, 20.0


@pytest.fixture(params=ALL, ids=" + ".join)
def target(request: pytest.FixtureRequest) -> list[Object]:
    return render(*request.param)


@pytest.fixture(scope="session")
def custom_resources() -> dict[str, Any]:
    schemas: dict[str, Any] = yaml.safe_load((ROOT / "tests/deploy/custom_resources.yaml").read_text())
    return schemas


def check_valid(thing: Object, version: str, custom_resources: dict[str, Any]) -> None:
    schema = custom_resources.get(f"{thing['apiVersion']}/{thing['kind']}")
    if schema is not None:
        Draft202012Validator({**schema, "$defs": custom_resources["$defs"]}).validate(thing)
    else:
        kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_one_that_kubernetes_knows(version, custom_resources):
    # Most are alike in several folders, and the schemas are large.
    different = {yaml.safe_dump(thing): thing for folder in ALL for thing in render(*folder)}
    assert len(different) > 50
    for thing in different.values():
        check_valid(thing, version, custom_resources)


def test_a_misspelt_field_is_found(custom_resources):
    [thing] = of_kind(render("overlays/cpu", "prometheus"), "PodMonitor")
    for wrong in ({**thing, "specs": {}}, {**thing, "spec": {**thing["spec"], "selectors": {}}}):
        with pytest.raises(Exception, match=r"specs|selectors"):
            check_valid(wrong, VERSIONS[-1], custom_resources)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [], "hostNetworks": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_valid(pod, VERSIONS[-1], custom_resources)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=" + ".join)
def test_an_overlay_is_one_namespace_and_the_images_of_this_version(overlay):
    objects = render(*overlay)
    [namespace] = named(objects, "Namespace")
    assert {thing["metadata"].get("namespace") for thing in objects if thing["kind"] != "Namespace"} == {namespace}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, deployment in deployments(objects).items():
        cuda = "nvidia.com/gpu" in server_of(deployment)["resources"]["limits"]
        assert server_of(deployment)["image"] == f"streamflow-{name}:{version}{'-cuda' if cuda else ''}"


def test_the_base_says_no_namespace():
    assert not [thing for thing in render("base") if "namespace" in thing["metadata"] or thing["kind"] == "Namespace"]


def test_there_is_a_deployment_for_each_process(target):
    assert deployments(target).keys() == NAMES.keys()


# Pods


def violations(pod: Object) -> Iterator[str]:
    """What the restricted Pod Security Standard refuses, read-only roots and tokens besides."""
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "a namespace of the host"
    if pod["automountServiceAccountToken"] is not False:
        yield "a token"
    context = pod["securityContext"]
    if not (context["runAsNonRoot"] is True and context["runAsUser"] == context["runAsGroup"] == 65534):
        yield "another user than nobody"
    if context["seccompProfile"] != {"type": "RuntimeDefault"}:
        yield "system calls"
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    if not kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}:
        yield f"volumes: {kinds}"
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        if container["securityContext"] != {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }:
            yield f"{container['securityContext']}"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield "a port of the host"


def test_pods_have_no_rights_that_they_do_not_need(target):
    for deployment in deployments(target).values():
        assert not list(violations(pod_of(deployment)))
    for account in of_kind(target, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_what_would_break_the_standard_is_found():
    pod = pod_of(deployments(render("base"))["gateway"])
    changes: list[Object] = [
        {"hostNetwork": True},
        {"automountServiceAccountToken": True},
        {"securityContext": {**pod["securityContext"], "runAsUser": 0}},
        {"securityContext": {**pod["securityContext"], "seccompProfile": {"type": "Unconfined"}}},
        {"volumes": [{"name": "x", "hostPath": {}}]},
        {"containers": [{"securityContext": {"privileged": True}}]},
    ]
    for change in changes:
        assert len(list(violations({**pod, **change}))) == 1


def test_the_namespaces_hold_pods_to_the_restricted_standard():
    for overlay in OVERLAYS:
        [namespace] = of_kind(render(*overlay), "Namespace")
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", NAMES)
def test_user_and_port_are_those_of_the_image(name, target):
    lines = (ROOT / DOCKERFILES[name]).read_text("utf-8")
    pod, server = pod_of(deployments(target)[name]), server_of(deployments(target)[name])
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in lines
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert f"EXPOSE {ports['grpc']}" in lines
    assert f"STREAMFLOW_PORT={ports['grpc']}" in lines
    values = environment(target, deployments(target)[name], SECRETS)
    assert values["STREAMFLOW_METRICS_PORT"] == str(ports["metrics"])
    assert values.get("STREAMFLOW_HEALTH_PORT", ports["grpc"]) in (ports["grpc"], str(ports.get("health")))
    # What is written goes to a volume, since the root is read-only.
    mounts = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    assert mounts == {"/tmp", "/engines"}
    assert "STREAMFLOW_CACHE=/engines" in lines
    if "/model" in {mount["mountPath"] for mount in server["volumeMounts"]}:
        assert values["STREAMFLOW_MODEL"] == "/model"
    else:
        assert values["STREAMFLOW_MODEL"] == "/app/models/shapes"
        assert "WORKDIR /app\n" in lines
        assert "COPY models/shapes ./models/shapes" in lines


def amount(quantity: str) -> Decimal:
    number, unit = re.fullmatch(r"(\d+)(\D*)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"": Decimal(1), "m": Decimal("0.001"), "Mi": Decimal(2**20), "Gi": Decimal(2**30)}[unit]


def test_every_container_says_what_it_needs_and_takes_at_most(target):
    for name, deployment in deployments(target).items():
        resources = server_of(deployment)["resources"]
        for kind in ("cpu", "memory"):
            assert amount(resources["requests"][kind]) <= amount(resources["limits"][kind])
        assert resources["requests"].get("nvidia.com/gpu") == resources["limits"].get("nvidia.com/gpu")
        if name in STAGES:
            # The rest of a limit would be lost: threads are as many as there are whole CPUs.
            assert amount(resources["limits"]["cpu"]) % 1 == 0
        in_memory = [v["emptyDir"] for v in pod_of(deployment)["volumes"] if v.get("emptyDir", {}).get("medium")]
        assert sum(amount(each["sizeLimit"]) for each in in_memory) * 4 <= amount(resources["limits"]["memory"])
        assert all("sizeLimit" in volume.get("emptyDir", {"sizeLimit"}) for volume in pod_of(deployment)["volumes"])


def test_services_of_the_namespace_set_no_settings(target):
    assert all(pod_of(deployment)["enableServiceLinks"] is False for deployment in deployments(target).values())


# Probes


@pytest.mark.parametrize("name", NAMES)
def test_probes_ask_for_what_the_servers_tell(name, target):
    server = server_of(deployments(target)[name])
    full_name = FILES[name].DESCRIPTOR.services_by_name[NAMES[name]].full_name
    asked = {kind: server[f"{kind}Probe"]["grpc"]["service"] for kind in ("startup", "liveness", "readiness")}
    assert asked == {"startup": LIVENESS[1], "liveness": LIVENESS[1], "readiness": full_name}
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert {server[f"{kind}Probe"]["grpc"]["port"] for kind in asked} == {ports.get("health", ports["grpc"])}


def test_probes_know_no_tls(target):
    """A port that may be encrypted is not probed."""
    values = environment(target, deployments(target)["gateway"], SECRETS)
    probed = server_of(deployments(target)["gateway"])["livenessProbe"]["grpc"]["port"]
    assert str(probed) == values["STREAMFLOW_HEALTH_PORT"]
    for stage in STAGES:
        assert not [name for name in environment(target, deployments(target)[stage], SECRETS) if "TLS" in name]


def test_a_slow_start_is_no_death_and_a_hang_is_one(target):
    for name, deployment in deployments(target).items():
        server = server_of(deployment)
        starts_s = server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"]
        on_volume = any("persistentVolumeClaim" in volume for volume in pod_of(deployment)["volumes"])
        assert starts_s >= (1800 if on_volume else 300 if name in STAGES else 120)
        # A rollout must not be given up while a replica may still be starting.
        assert deployment["spec"].get("progressDeadlineSeconds", 600) > starts_s
        dead_s = server["livenessProbe"]["periodSeconds"] * server["livenessProbe"]["failureThreshold"]
        assert 30 <= dead_s <= 120


# Settings, Secrets, names


@pytest.mark.parametrize("name", NAMES)
def test_variables_are_settings_of_the_process_with_values_that_it_takes(name, target, monkeypatch):
    values = environment(target, deployments(target)[name], SECRETS)
    fields = {f"STREAMFLOW_{field.upper()}" for field in KINDS[name].model_fields}
    # Every process gets it, and serves metrics there once it knows it.
    assert set(values) <= fields
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    settings = KINDS[name]()
    assert settings.redis_url == SECRETS["streamflow-redis", "url"]
    assert settings.deployment == values["STREAMFLOW_DEPLOYMENT"]


def test_all_processes_agree_on_what_they_share(target):
    found = [environment(target, deployment, SECRETS) for deployment in deployments(target).values()]
    for name in ("DEPLOYMENT", "MODEL", "MODEL_NAME", "REDIS_URL", "DRAIN_GRACE_S"):
        assert len({values[f"STREAMFLOW_{name}"] for values in found}) == 1


def test_what_is_referred_to_is_there_or_the_readme_says_how_to_make_it(target):
    readme = (FOLDER / "README.md").read_text("utf-8")
    maps, claims = named(target, "ConfigMap"), named(target, "PersistentVolumeClaim")
    for deployment in deployments(target).values():
        pod, server = pod_of(deployment), server_of(deployment)
        assert pod["serviceAccountName"] in named(target, "ServiceAccount")
        assert all(source["configMapRef"]["name"] in maps for source in server["envFrom"])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in server["volumeMounts"]} == set(volumes)
        references = [variable["valueFrom"]["secretKeyRef"] for variable in server["env"] if "valueFrom" in variable]
        wanted = {(reference["name"], reference["key"]) for reference in references}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "secret" in volume:
                wanted |= set(keys_of(volume, server))
        for name, key in wanted:
            assert re.search(rf"^\|[^|]*`{name}`.*`{re.escape(key)}`", readme, re.MULTILINE), (name, key)


def keys_of(volume: Object, server: Object) -> Iterator[tuple[str, str]]:
    """The keys of a Secret that is mounted: the files in it that variables name."""
    [mount] = [mount for mount in server["volumeMounts"] if mount["name"] == volume["name"]]
    files = [v["value"] for v in server["env"] if v.get("value", "").startswith(f"{mount['mountPath']}/")]
    assert files
    # Readable for the group alone, which is the process's.
    assert volume["secret"]["defaultMode"] == 0o440
    assert mount["readOnly"] is True
    yield from ((volume["secret"]["secretName"], path.rpartition("/")[2]) for path in files)


def test_selectors_take_the_pods_that_they_are_for(target):
    pods = {name: labels_of(deployment) for name, deployment in deployments(target).items()}
    for name, deployment in deployments(target).items():
        takes = [other for other, labels in pods.items() if selects(deployment["spec"]["selector"], labels)]
        assert takes == [name]
        for spread in pod_of(deployment)["topologySpreadConstraints"]:
            assert [other for other, labels in pods.items() if selects(spread["labelSelector"], labels)] == [name]
    for service in of_kind(target, "Service"):
        assert [name for name in pods if selects({"matchLabels": service["spec"]["selector"]}, pods[name])] == [
            "gateway"
        ]
        [port] = service["spec"]["ports"]
        assert port["targetPort"] in {each["name"] for each in server_of(deployments(target)["gateway"])["ports"]}


@pytest.mark.parametrize("overlay", ["overlays/cpu", "overlays/gpu"])
def test_each_process_gets_into_redis_as_its_own_user(overlay):
    objects = render(overlay, "redis-users")
    for name, deployment in deployments(objects).items():
        values = environment(objects, deployment, SECRETS)
        [user] = [user for user in users_of(values["STREAMFLOW_DEPLOYMENT"], []) if user.role == name]
        assert values["STREAMFLOW_REDIS_USER"] == user.name
        assert values["STREAMFLOW_REDIS_PASSWORD_FILE"].endswith(f"/{user.password_file}")
        [volume] = [each for each in pod_of(deployment)["volumes"] if each["name"] == "redis-password"]
        # The passwords of the others stay outside.
        assert volume["secret"]["items"] == [{"key": user.password_file, "path": user.password_file}]


def test_the_readmes_overlay_is_one(tmp_path):
    text = (FOLDER / "README.md").read_text("utf-8")
    [overlay] = re.findall(r"```yaml\n# deploy/kubernetes/(\S+)\n(.*?)```", text, re.DOTALL)
    [more] = re.findall(r"```yaml\n(configMapGenerator:.*?)```", text, re.DOTALL)
    copy = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, copy)
    file = copy / overlay[0]
    file.parent.mkdir()
    file.write_text(overlay[1] + more)
    objects = build(str(file.parent))
    for name, deployment in deployments(objects).items():
        values = environment(objects, deployment, SECRETS)
        assert values["STREAMFLOW_REDIS_USER"] == f"default-{name}"
        mounts = [each["mountPath"] for each in server_of(deployment)["volumeMounts"]]
        for setting in ("REDIS_CA", "REDIS_CERT", "REDIS_KEY", "REDIS_PASSWORD_FILE"):
            assert values[f"STREAMFLOW_{setting}"].rpartition("/")[0] in mounts
        assert ("STREAMFLOW_TLS_CERT" in values) == ("STREAMFLOW_API_KEYS_FILE" in values) == (name == "gateway")


# Coming and going


def test_what_leaves_has_the_time_to_finish(target):
    for name, deployment in deployments(target).items():
        values, server = environment(target, deployment, SECRETS), server_of(deployment)
        leaving_s = server.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        # Only the gateway is called through a Service, which takes a moment to forget a pod.
        assert (leaving_s > 0) == (name == "gateway")
        needed_s = leaving_s + float(values["STREAMFLOW_DRAIN_GRACE_S"]) + CUT_S + EXIT_S
        assert pod_of(deployment)["terminationGracePeriodSeconds"] >= needed_s


def test_a_rollout_takes_no_replica_away_before_another_is_ready(target):
    for name, deployment in deployments(target).items():
        update = deployment["spec"]["strategy"]["rollingUpdate"]
        on_gpu = "nvidia.com/gpu" in server_of(deployment)["resources"]["limits"]
        # A GPU that only the old replica can free would never come.
        assert update == ({"maxSurge": 0, "maxUnavailable": 1} if on_gpu else {"maxSurge": 1, "maxUnavailable": 0})
        assert name != "gateway" or not on_gpu
    assert deployments(target)["gateway"]["spec"]["replicas"] >= 2


def test_a_node_can_be_drained_and_takes_one_replica_of_a_stage_at_a_time(target):
    budgets = of_kind(target, "PodDisruptionBudget")
    for deployment in deployments(target).values():
        [budget] = [each for each in budgets if selects(each["spec"]["selector"], labels_of(deployment))]
        assert budget["spec"]["maxUnavailable"] == 1
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert len(budgets) == len(NAMES)


# With a GPU


@pytest.mark.parametrize("overlay", OVERLAYS[1:], ids=" + ".join)
def test_denoisers_and_decoders_have_a_gpu_each_and_fail_without(overlay):
    objects = render(*overlay)
    for name, deployment in deployments(objects).items():
        server, values = server_of(deployment), environment(objects, deployment, SECRETS)
        on_gpu = name in ("denoiser", "decoder")
        assert server["resources"]["limits"].get("nvidia.com/gpu") == (1 if on_gpu else None)
        assert values.get("STREAMFLOW_DEVICE") == ({"gateway": None, "encoder": "cpu"}.get(name, "cuda"))
        [model] = [mount for mount in server["volumeMounts"] if mount["mountPath"] == "/model"]
        assert model["readOnly"] is True
        volumes = {each["name"]: each.get("persistentVolumeClaim") for each in pod_of(deployment)["volumes"]}
        assert volumes[model["name"]]["readOnly"] is True
        # Engines are programs: who talks to the world does not write where stages take theirs from.
        claim = "streamflow-digests" if name == "gateway" else "streamflow-engines"
        assert volumes["engines"] == {"claimName": claim}


def test_the_pod_that_copies_a_model_has_no_more_rights_than_others(custom_resources):
    [pod] = render("load-model")
    for version in VERSIONS:
        check_valid(pod, version, custom_resources)
    assert not list(violations(pod["spec"]))
    [volume] = pod["spec"]["volumes"]
    gpu = render("overlays/gpu")
    assert volume["persistentVolumeClaim"]["claimName"] in named(gpu, "PersistentVolumeClaim")
    assert pod["spec"]["containers"][0]["image"] == server_of(deployments(gpu)["gateway"])["image"]
    assert pod["metadata"]["namespace"] == deployments(gpu)["gateway"]["metadata"]["namespace"]
    # It is nobody's replica, and nobody can reach it.
    assert not [d for d in deployments(gpu).values() if selects(d["spec"]["selector"], pod["metadata"]["labels"])]
    assert pod["metadata"]["labels"][COMPONENT] not in NAMES
    policies = named(gpu, "NetworkPolicy")
    assert selects(policies["streamflow-deny"]["spec"]["podSelector"], pod["metadata"]["labels"])
