"""What the Compose files and the Dockerfiles promise; tests/compose/ builds the images and runs them."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamflow.config import GatewaySettings, Settings, StageSettings
from streamflow.model_names import deployment_of, read_models
from streamflow.rpc import server
from streamflow.v1 import decoder_pb2, denoiser_pb2, encoder_pb2, gateway_pb2

ROOT = Path(__file__).parent.parent
FILE, GPU, TWO_MODELS = "docker-compose.yml", "compose.gpu.yml", "examples/two-models.compose.yml"
DOCKERFILES = {
    "gateway": ROOT / "gateway" / "Dockerfile",
    **{stage: ROOT / "services" / stage / "Dockerfile" for stage in ("encoder", "denoiser", "decoder")},
}
STAGES = ("encoder", "denoiser", "decoder")
OURS = ("gateway", *STAGES)
MONITORING = ("prometheus", "grafana")
PROTOS = {
    "gateway": (gateway_pb2, "Gateway"),
    "encoder": (encoder_pb2, "TextEncoder"),
    "denoiser": (denoiser_pb2, "Denoiser"),
    "decoder": (decoder_pb2, "Decoder"),
}
Service = dict[str, Any]


def interpolated(value: Any) -> Any:
    """As Compose does it in an empty environment: defaults, and `$$` for `$`."""
    match value:
        case dict():
            return {key: interpolated(one) for key, one in value.items()}
        case list():
            return [interpolated(one) for one in value]
        case str():
            return re.sub(r"\$(\$)|\$\{\w+(?::-([^}]*))?\}", lambda found: found[1] or found[2] or "", value)
        case _:
            return value


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = interpolated(yaml.safe_load((ROOT / name).read_text("utf-8")))
    return loaded


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load(FILE)


@pytest.fixture(params=[*OURS, "redis", *MONITORING])
def service(request: pytest.FixtureRequest, compose: dict[str, Any]) -> Service:
    found: Service = compose["services"][request.param]
    return found


def tool(*names: str) -> str:
    """The first that is there, beside this Python too; skips where there is none."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = [where for name in names if (where := shutil.which(name, path=path))]
    if not found:
        pytest.skip(f"none of these is installed: {', '.join(names)}")
    return found[0]


def compose_command() -> list[str]:
    # podman-compose comes with our own development tools, podman does not.
    command = tool("docker-compose", "docker", *(["podman-compose"] if shutil.which("podman") else []))
    if Path(command).name == "docker":
        if subprocess.run([command, "compose", "version"], capture_output=True).returncode:
            pytest.skip("docker has no compose plugin")
        return [command, "compose"]
    return [command]


def config(names: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    files = [part for name in names for part in ("-f", name)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFLOW_")}
    return subprocess.run(
        [*compose_command(), *files, *options, "config"], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("names", [[FILE], [FILE, GPU], [FILE, TWO_MODELS]], ids=["alone", "gpu", "two-models"])
@pytest.mark.parametrize("options", [[], ["--profile", "monitoring"]], ids=["plain", "monitoring"])
def test_compose_accepts_the_files(names: list[str], options: list[str]) -> None:
    result = config(names, *options)
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    assert set(OURS) | {"redis"} <= set(services)


@pytest.mark.parametrize("name", OURS)
def test_hadolint_finds_nothing(name: str) -> None:
    result = subprocess.run([tool("hadolint"), DOCKERFILES[name]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /tmp && pip install torch\n")
    assert subprocess.run([tool("hadolint"), bad], capture_output=True).returncode == 1


# -- what every container may ------------------------------------------------------------------------------------------


def test_containers_have_no_rights(service: Service) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert service["restart"] == "unless-stopped"
    assert service["tmpfs"] == ["/tmp:mode=1777,size=256m"]
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"} & service.keys()
    user, _, _group = service["user"].partition(":")
    assert int(user) > 0


def test_containers_are_limited(service: Service) -> None:
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert float(service["cpus"]) >= 0
    assert 0 < service["pids_limit"] <= 512
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}


def test_limits_are_settable(compose: dict[str, Any]) -> None:
    raw = yaml.safe_load((ROOT / FILE).read_text("utf-8"))["services"]
    for name, service in raw.items():
        assert service["mem_limit"].startswith(f"${{STREAMFLOW_{name.upper()}_MEMORY:-")
        assert service["cpus"].startswith(f"${{STREAMFLOW_{name.upper()}_CPUS:-")


def test_only_the_gateway_has_a_port(compose: dict[str, Any]) -> None:
    """Grafana, where it is asked for, is there for this machine alone."""
    published = {name: one["ports"] for name, one in compose["services"].items() if "ports" in one}
    assert published == {"gateway": ["0.0.0.0:50051:50051"], "grafana": ["127.0.0.1:3000:3000"]}
    assert "50051" in DOCKERFILES["gateway"].read_text("utf-8")


def test_only_the_gateway_is_on_both_networks(compose: dict[str, Any]) -> None:
    networks = {name: one["networks"] for name, one in compose["services"].items()}
    assert networks.pop("gateway") == ["clients", "internal"]
    assert networks.pop("grafana") == ["operators", "internal"]
    assert all(each == ["internal"] for each in networks.values())
    assert compose["networks"]["internal"] == {"internal": True}


@pytest.mark.parametrize("name", STAGES)
def test_stages_can_be_scaled(compose: dict[str, Any], name: str) -> None:
    assert not {"ports", "container_name", "hostname"} & compose["services"][name].keys()


def test_everything_says_whether_it_is_well(compose: dict[str, Any]) -> None:
    for name, one in compose["services"].items():
        assert "healthcheck" in one or "HEALTHCHECK" in DOCKERFILES[name].read_text("utf-8"), name


def test_monitoring_is_a_profile(compose: dict[str, Any]) -> None:
    assert {name for name, one in compose["services"].items() if "profiles" not in one} == {*OURS, "redis"}
    assert all(compose["services"][name]["profiles"] == ["monitoring"] for name in MONITORING)


# -- how they end and what they are told -------------------------------------------------------------------------------


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.mark.parametrize("name", OURS)
def test_there_is_time_to_drain(compose: dict[str, Any], name: str) -> None:
    one = compose["services"][name]
    drain_s = float(one["environment"]["STREAMFLOW_DRAIN_GRACE_S"])
    assert drain_s == Settings.model_fields["drain_grace_s"].default
    # The server cuts calls a moment after the grace period; then sockets, pools and the lease on a GPU are closed.
    assert seconds(one["stop_grace_period"]) >= drain_s + server._CUT_AFTER_S + 5


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting(compose: dict[str, Any], name: str) -> None:
    kind = GatewaySettings if name == "gateway" else StageSettings
    known = {f"STREAMFLOW_{field.upper()}" for field in StageSettings.model_fields | kind.model_fields}
    image = set(re.findall(r"STREAMFLOW_\w+(?==)", DOCKERFILES[name].read_text("utf-8")))
    gpu = set(load(GPU)["services"].get(name, {}).get("environment", {}))
    assert image
    assert image | gpu | set(compose["services"][name]["environment"]) <= known


def test_redis_keeps_what_was_accepted(compose: dict[str, Any]) -> None:
    redis = compose["services"]["redis"]
    command = " ".join(redis["command"])
    assert "--appendonly yes --appendfsync always" in command
    assert "--maxmemory-policy noeviction" in command
    assert "redis:/data" in redis["volumes"]
    gigabytes = float(redis["command"][redis["command"].index("--maxmemory") + 1].removesuffix("gb"))
    # Room for the copy that rewrites the append-only file, and for results and what is under way.
    assert float(redis["mem_limit"].removesuffix("g")) >= 2 * gigabytes
    assert gigabytes * 2**30 >= 2 * GatewaySettings.model_fields["max_reserved_bytes"].default


def test_the_password_of_redis_is_in_a_file_alone(compose: dict[str, Any]) -> None:
    for name in ("redis", *OURS):
        one = compose["services"][name]
        assert one["secrets"] == ["redis_password"]
        assert "/run/secrets/redis_password" in " ".join(one["entrypoint"])
        assert not [key for key in one.get("environment", {}) if "PASSWORD" in key or "URL" in key]
    assert compose["secrets"]["redis_password"] == {"file": "./secrets/redis_password"}
    assert "secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


def test_secrets_are_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "secrets"

    def make() -> dict[str, str]:
        subprocess.run(["sh", ROOT / "deploy" / "secrets.sh", folder], check=True, capture_output=True)
        return {path.name: path.read_text() for path in folder.iterdir()}

    made = make()
    assert set(made) == {"redis_password", "grafana_password"}
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in made.values())
    assert len(set(made.values())) == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # They are mounted as they are, for users that are nobody here.
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}
    assert make() == made


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_images_start_the_service_as_nobody(compose: dict[str, Any], name: str) -> None:
    text = DOCKERFILES[name].read_text("utf-8")
    one = compose["services"][name]
    assert (ROOT / one["build"]["dockerfile"]) == DOCKERFILES[name]
    assert one["image"].startswith(f"streamflow-{name}:")
    assert re.findall(r"^USER (.*)", text, re.M) == ["65534:65534"] == [one["user"]]
    [port] = re.findall(r"STREAMFLOW_PORT=(\d+)", text)
    protos, service = PROTOS[name]
    full_name = protos.DESCRIPTOR.services_by_name[service].full_name
    assert f"EXPOSE {port}\n" in text
    assert f'"streamflow.rpc.probe", "127.0.0.1:{port}", "{full_name}"' in text
    [module] = re.findall(r'ENTRYPOINT \["/venv/bin/python", "-m", "(.*)"\]', text)
    # Compose starts the same, behind the shell that reads the password.
    assert one["command"] == [module, "--model", "/model"]
    assert one["volumes"][0] == "./models/shapes:/model:ro"


@pytest.mark.parametrize("name", OURS)
def test_images_are_built_in_two_stages_on_a_pinned_base(name: str) -> None:
    text = DOCKERFILES[name].read_text("utf-8")
    assert "ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm\n" in text
    assert re.findall("^FROM (.*)", text, re.M) == ["${PYTHON_IMAGE} AS builder", "${PYTHON_IMAGE}"]
    final = text.rpartition("\nFROM ")[2]
    assert "pip" not in final


def test_stages_share_their_layers() -> None:
    """A builder finds everything before the last part in its cache."""
    shared = set()
    for name in STAGES:
        steps = [line for line in DOCKERFILES[name].read_text("utf-8").split("\n") if not line.startswith("#")]
        shared.add("\n".join(steps).partition("\nLABEL")[0])
    assert len(shared) == 1


@pytest.mark.parametrize("name", OURS)
def test_dockerfile_copies_what_exists(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[1] == "*"
    for line in DOCKERFILES[name].read_text("utf-8").splitlines():
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert source in let_in, f"{source} is not part of the build's context"


# -- the files beside it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_on_gpus_every_replica_sees_all_of_them(compose: dict[str, Any], name: str) -> None:
    one = load(GPU)["services"][name]
    [devices] = one["deploy"]["resources"]["reservations"]["devices"]
    assert devices == {"driver": "nvidia", "count": "all", "capabilities": ["gpu", "compute", "utility"]}
    # Which one it gets is chosen by itself, in Redis.
    assert one["environment"] == {"STREAMFLOW_GPU": "auto"}
    assert one["image"] == compose["services"][name]["image"] + "-cuda"
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILES[name].read_text("utf-8"), re.M))
    assert one["build"]["args"] == {"TORCH_INDEX": "", "EXTRA": "tensorrt"}
    assert one["build"]["args"].keys() <= arguments


@pytest.mark.parametrize("stage", STAGES)
def test_the_gateway_finds_the_stages_of_a_second_model(compose: dict[str, Any], stage: str) -> None:
    two = load(TWO_MODELS)["services"]
    [(name, folder)] = read_models(two["gateway"]["environment"]["STREAMFLOW_MORE_MODELS"]).items()
    first, second = compose["services"][stage], two[f"{name}-{stage}"]
    # As what its weights are served, a further model's folder says.
    shared = {key: value for key, value in first["environment"].items() if key != "STREAMFLOW_FLOW"}
    assert second["environment"] == {
        **shared,
        "STREAMFLOW_MODEL_NAME": name,
        "STREAMFLOW_DEPLOYMENT": deployment_of(first["environment"]["STREAMFLOW_DEPLOYMENT"], name),
    }
    # The checkpoint is one and the same.
    [mounted] = two["gateway"]["volumes"]
    assert mounted == second["volumes"][0].replace(":/model:", f":{folder}:")
    alike = set(first) - {"environment", "volumes"}
    assert {key: second[key] for key in alike} == {key: first[key] for key in alike}


def test_prometheus_asks_every_process(compose: dict[str, Any]) -> None:
    [job] = load("deploy/prometheus/prometheus.yml")["scrape_configs"]
    [found] = job["dns_sd_configs"]
    assert set(found["names"]) == set(OURS) <= set(compose["services"])
    for name in OURS:
        assert str(found["port"]) == compose["services"][name]["environment"]["STREAMFLOW_METRICS_PORT"]
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["prometheus"]["volumes"])
    assert (ROOT / "deploy" / "prometheus" / "prometheus.yml").exists()
    assert mounted["./deploy/prometheus"] == "/etc/streamflow"
    assert "--config.file=/etc/streamflow/prometheus.yml" in compose["services"]["prometheus"]["command"]


def test_grafana_finds_prometheus_and_the_dashboards(compose: dict[str, Any]) -> None:
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    for folder in ("./deploy/grafana/provisioning", "./deploy/grafana/dashboards"):
        assert (ROOT / folder).is_dir()
    [source] = load("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = load("deploy/grafana/provisioning/dashboards/streamflow.yml")["providers"]
    assert provider["options"]["path"] == mounted["./deploy/grafana/dashboards"]
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == (
        "/run/secrets/" + compose["services"]["grafana"]["secrets"][0]
    )
