"""docker-compose.yml says what the README promises; a real engine runs it elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamflow.model_names import deployment_of, read_models

ROOT = Path(__file__).parent.parent
STAGES = ("encoder", "denoiser", "decoder")
FILE, TWO_MODELS = "docker-compose.yml", "examples/two-models.compose.yml"


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load(FILE)


@pytest.mark.parametrize("names", [[FILE], [FILE, TWO_MODELS]])
def test_compose_accepts_the_files(names: list[str]) -> None:
    command = next((name for name in ("docker-compose", "docker") if shutil.which(name)), None)
    if command is None:
        pytest.skip("neither docker-compose nor docker is installed")
    arguments = ["compose"] if command == "docker" else []
    if arguments and subprocess.run([command, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker has no compose plugin")
    arguments += [part for name in names for part in ("-f", name)]
    result = subprocess.run([command, *arguments, "config", "-q"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_stages_can_be_scaled(compose: dict[str, Any], stage: str) -> None:
    service = compose["services"][stage]
    assert "ports" not in service
    assert "container_name" not in service


def test_redis_keeps_what_was_accepted(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["redis"]["command"])
    assert "--appendonly yes --appendfsync always" in command
    assert "--maxmemory-policy noeviction" in command
    assert "ports" not in compose["services"]["redis"]


@pytest.mark.parametrize("name", ["gateway", *STAGES])
def test_images_are_checked_restarted_and_not_root(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["restart"] == "unless-stopped"
    lines = (ROOT / service["build"]["dockerfile"]).read_text("utf-8").splitlines()
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1].split(":")[0] not in ("root", "0")


@pytest.mark.parametrize("name", ["gateway", *STAGES])
def test_dockerfile_copies_what_exists(compose: dict[str, Any], name: str) -> None:
    for line in (ROOT / compose["services"][name]["build"]["dockerfile"]).read_text("utf-8").splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line


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
