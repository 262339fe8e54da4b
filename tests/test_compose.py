"""What the Compose files and the Dockerfiles promise; tests/compose/ builds the images and runs them."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from streamflow.config import GatewaySettings, Settings, StageSettings
from streamflow.errors import NotFoundError
from streamflow.model_names import deployment_of, read_models
from streamflow.rpc import server
from streamflow.transport.acl import RIGHTS
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.redis_access import RedisAccess
from streamflow.transport.redis_streams import RedisTransport
from streamflow.v1 import decoder_pb2, denoiser_pb2, encoder_pb2, gateway_pb2
from tests.transport.worlds import redis_binary

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
    assert 0 < service["pids_limit"] <= 512
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}


def test_only_stages_have_all_cores(compose: dict[str, Any]) -> None:
    for name, one in compose["services"].items():
        assert (float(one["cpus"]) == 0) == (name in STAGES), name


def test_limits_are_settable(compose: dict[str, Any]) -> None:
    raw = yaml.safe_load((ROOT / FILE).read_text("utf-8"))["services"]
    for name, service in raw.items():
        assert service["mem_limit"].startswith(f"${{STREAMFLOW_{name.upper()}_MEMORY:-")
        assert service["cpus"].startswith(f"${{STREAMFLOW_{name.upper()}_CPUS:-")


def test_only_the_gateway_has_a_port(compose: dict[str, Any]) -> None:
    """And that for this machine alone, as nothing asks for keys yet; so is Grafana, where it is asked for."""
    published = {name: one["ports"] for name, one in compose["services"].items() if "ports" in one}
    assert published == {"gateway": ["127.0.0.1:50051:50051"], "grafana": ["127.0.0.1:3000:3000"]}
    assert "50051" in DOCKERFILES["gateway"].read_text("utf-8")


def test_only_the_gateway_is_on_both_networks(compose: dict[str, Any]) -> None:
    networks = {name: one["networks"] for name, one in compose["services"].items()}
    assert networks.pop("gateway") == ["clients", "internal"]
    # It has a way out, so none to Redis and the stages.
    assert networks.pop("grafana") == ["operators", "monitoring"]
    assert networks.pop("prometheus") == ["internal", "monitoring"]
    assert all(each == ["internal"] for each in networks.values())
    assert compose["networks"]["internal"] == compose["networks"]["monitoring"] == {"internal": True}


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
    of_each = int(load(TWO_MODELS)["services"]["gateway"]["environment"]["STREAMFLOW_MAX_RESERVED_BYTES"])
    assert gigabytes * 2**30 >= 2 * 2 * of_each


def test_each_service_has_a_user_of_redis_with_a_password_in_a_file(compose: dict[str, Any]) -> None:
    for name in OURS:
        one = compose["services"][name]
        assert one["secrets"] == [f"redis_{name}"]
        told = {key: value for key, value in one["environment"].items() if key.startswith("STREAMFLOW_REDIS")}
        assert told == {
            "STREAMFLOW_REDIS_URL": "redis://redis:6379/0",
            "STREAMFLOW_REDIS_USER": name,
            "STREAMFLOW_REDIS_PASSWORD_FILE": f"/run/secrets/redis_{name}",
        }
    redis = compose["services"]["redis"]
    assert redis["secrets"] == ["redis_users", "redis_administrator"]
    assert redis["entrypoint"] + redis["command"][:2] == ["redis-server", "--aclfile", "/run/secrets/redis_users"]
    mounted = {name for one in compose["services"].values() for name in one.get("secrets", ())}
    assert {name: one["file"] for name, one in compose["secrets"].items()} == {
        name: f"./secrets/{name}" for name in mounted
    }
    assert "secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


def test_keys_and_tls_stay_on_whatever_files_are_named() -> None:
    """They are variables, which `.env` has: a file of one's own is not read where -f names others."""
    told = yaml.safe_load((ROOT / FILE).read_text("utf-8"))["services"]["gateway"]["environment"]
    settings = ("API_KEYS_FILE", "TLS_CERT", "TLS_KEY")
    assert {name: told[f"STREAMFLOW_{name}"] for name in settings} == {
        "API_KEYS_FILE": "${STREAMFLOW_GATEWAY_KEYS_FILE:-}",
        "TLS_CERT": "${STREAMFLOW_GATEWAY_TLS_CERT:-}",
        "TLS_KEY": "${STREAMFLOW_GATEWAY_TLS_KEY:-}",
    }
    for other in (GPU, TWO_MODELS):
        changed = load(other)["services"].get("gateway", {}).get("environment", {})
        assert not {f"STREAMFLOW_{name}" for name in settings} & set(changed)


def make_secrets(folder: Path) -> dict[str, str]:
    subprocess.run(["sh", ROOT / "deploy" / "secrets.sh", folder], check=True, capture_output=True)
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_secrets_are_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "a folder" / "secrets"
    made = make_secrets(folder)
    assert set(made) == set(load(FILE)["secrets"])
    passwords = {name: text for name, text in made.items() if name != "redis_users"}
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in passwords.values())
    assert len(set(passwords.values())) == len(passwords)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # They are mounted as they are, for users that are nobody here.
    assert all(path.stat().st_mode & stat.S_IROTH for path in folder.iterdir())
    assert make_secrets(folder) == made


def test_a_password_is_exchanged_alone(tmp_path: Path) -> None:
    before = make_secrets(tmp_path)
    mounted = (tmp_path / "redis_users").stat().st_ino
    (tmp_path / "redis_decoder").unlink()
    after = make_secrets(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"redis_decoder", "redis_users"}
    changed = set(before["redis_users"].splitlines()) ^ set(after["redis_users"].splitlines())
    assert {line.split()[1] for line in changed} == {"decoder"}
    assert (tmp_path / "redis_users").stat().st_ino == mounted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has 0"),
        ("\n", "has 0"),
        ("short\n", "has 5"),
        ("long enough, of words", "a blank"),
        ("x" * 20 + "\r\n", "a blank"),
    ],
)
def test_a_password_that_is_none_is_refused(tmp_path: Path, text: str, why: str) -> None:
    before = make_secrets(tmp_path)
    (tmp_path / "redis_administrator").chmod(0o600)
    (tmp_path / "redis_administrator").write_text(text)
    (tmp_path / "redis_decoder").unlink()
    result = subprocess.run(["sh", ROOT / "deploy" / "secrets.sh", tmp_path], capture_output=True, text=True)
    assert result.returncode != 0
    assert "redis_administrator" in result.stderr
    assert why in result.stderr
    assert (tmp_path / "redis_users").read_text() == before["redis_users"]


def test_where_there_is_no_chance_there_is_no_password(tmp_path: Path) -> None:
    tools, folder = tmp_path / "tools", tmp_path / "secrets"
    tools.mkdir()
    (tools / "od").write_text("#!/bin/sh\nexit 1\n")
    (tools / "od").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["sh", ROOT / "deploy" / "secrets.sh", folder]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no random bytes" in result.stderr
    assert [path for path in folder.iterdir() if path.is_file()] == []


def secrets_sh(*arguments: str, folder: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "deploy" / "secrets.sh"), *arguments]
    environment = {"PATH": os.environ["PATH"], "STREAMFLOW_SECRETS": said}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_folder_of_secrets_may_stand_where_compose_reads_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("STREAMFLOW_TAG=1\nSTREAMFLOW_SECRETS=./elsewhere\n")
    for arguments, said, folder in (((), "", "elsewhere"), ((), "./set", "set"), (("given",), "./set", "given")):
        assert not (tmp_path / folder).exists()
        assert secrets_sh(*arguments, folder=tmp_path, said=said).returncode == 0
        assert (tmp_path / folder / "redis_users").exists()
    # Compose would mount a volume of that name.
    refused = secrets_sh(folder=tmp_path, said="unset")
    assert refused.returncode != 0
    assert "such as ./unset" in refused.stderr
    assert not (tmp_path / "unset").exists()
    (tmp_path / ".env").write_text('STREAMFLOW_SECRETS="$HOME/secrets"\n')
    refused = secrets_sh(folder=tmp_path)
    assert refused.returncode != 0
    assert "in .env: got" in refused.stderr
    assert not (tmp_path / "secrets").exists()
    (tmp_path / ".env").unlink()
    assert secrets_sh(folder=tmp_path).returncode == 0
    assert (tmp_path / "secrets" / "redis_users").exists()


def test_the_script_of_secrets_tells_how_it_is_used(tmp_path: Path) -> None:
    for argument in ("-h", "--help"):
        asked = secrets_sh(argument, folder=tmp_path)
        assert (asked.returncode, asked.stderr) == (0, "")
        assert asked.stdout.startswith("usage: sh deploy/secrets.sh [FOLDER]")
    for wrong in (("--folder",), ("-p", "x"), ("one", "two")):
        refused = secrets_sh(*wrong, folder=tmp_path)
        assert refused.returncode != 0
        assert refused.stderr.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


def test_users_of_redis_have_the_rights_of_this_version(tmp_path: Path) -> None:
    code = runpy.run_path(str(ROOT / "deploy" / "redis" / "users.py"))
    template = (ROOT / "deploy" / "redis" / "users.acl.template").read_text("utf-8")
    assert template == code["text"](), "run: python deploy/redis/users.py"
    secrets = make_secrets(tmp_path)
    for name in (*RIGHTS, "administrator"):
        template = template.replace(f"<{name}>", hashlib.sha256(secrets[f"redis_{name}"].encode()).hexdigest())
    assert secrets["redis_users"] == template


@asynccontextmanager
async def closing(transport: RedisTransport) -> AsyncIterator[RedisTransport]:
    try:
        yield transport
    finally:
        await transport.close()


@pytest.mark.parametrize("version", ["6.2", "7"])
async def test_redis_lets_each_user_in_to_deployments_of_any_name(tmp_path: Path, version: str) -> None:
    users = make_secrets(tmp_path)["redis_users"].splitlines()
    with EmbeddedRedis(binary=redis_binary(version)) as server, redis.Redis.from_url(server.url) as raw:
        for line in users[1:]:
            raw.execute_command("ACL", "SETUSER", *line.split()[1:])
        address = server.url.rpartition("@")[2]
        for user in RIGHTS:
            access = RedisAccess(f"redis://{address}", tmp_path / f"redis_{user}", user=user)
            async with closing(RedisTransport.from_url(access, deployment="any-name")) as transport:
                # Scripts that touch the keys and channels of jobs and of stages.
                with pytest.raises(NotFoundError):
                    await transport.cancel("no-such-job")
                assert not any((await transport.backlog()).values())
        assert raw.acl_log() == []
        raw.execute_command("AUTH", "decoder", (tmp_path / "redis_decoder").read_text())
        with pytest.raises(redis.exceptions.NoPermissionError):
            raw.get("sf:v1:{any-name}:cached:x")


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
    assert module == ("gateway" if name == "gateway" else f"services.{name}")
    # Compose adds to it, and puts nothing in its place.
    assert "entrypoint" not in one
    assert one["command"] == ["--model", "/model"]
    own = ["./secrets/access:/access:ro", "digests:/engines"] if name == "gateway" else ["engines:/engines"]
    assert one["volumes"] == ["./models/shapes:/model:ro", *own]


@pytest.mark.parametrize("name", OURS)
def test_images_are_built_in_two_stages_on_a_pinned_base(name: str) -> None:
    text = DOCKERFILES[name].read_text("utf-8")
    assert "ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm\n" in text
    assert re.findall("^FROM (.*)", text, re.M) == ["${PYTHON_IMAGE} AS builder", "${PYTHON_IMAGE}"]
    final = text.rpartition("\nFROM ")[2]
    assert "pip" not in final


@pytest.mark.parametrize("name", OURS)
def test_images_take_packages_by_their_hashes(name: str) -> None:
    """Those of constraints.txt, all that is needed and nothing else; torch comes by itself."""
    folder = "gateway" if name == "gateway" else "services"
    text = DOCKERFILES[name].read_text("utf-8")
    assert f"COPY {folder}/requirements.txt ./\n" in text
    assert "pip install --no-cache-dir --require-hashes --no-deps -r requirements.txt" in text
    code = runpy.run_path(str(ROOT / "deploy" / "lock.py"))
    file = ROOT / folder / "requirements.txt"
    listed = re.findall(r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", file.read_text("utf-8"), re.M)
    versions = code["versions"]()
    assert {one: version for one, version, _ in listed} == {
        one: versions[one] for one in code["closure"](code["LISTS"][file])
    }, "run: make lock"
    assert file.read_text("utf-8").count("==") == len(listed)


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
                parts = {source, *map(str, Path(source).parents)}
                assert parts & set(let_in), f"{source} is not part of the build's context"


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
