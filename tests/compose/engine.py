"""Podman in the place of Docker: building the images, and the composition as a thing to be poked at."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BUILT = ("gateway", "encoder", "denoiser", "decoder")
TAG = "compose-test"
BUILD_S, COMMAND_S = 1800.0, 300.0
_CERTIFICATES = Path("/etc/ssl/certs")


class Podman:
    """Runs podman and podman-compose with settings of their own.

    Args:
        folder: for what they need to be told.
        variables: what docker-compose.yml takes from the environment.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self._folder = folder
        own = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFLOW_")}
        # Images in Docker's format, as the other one has no health checks.
        told = {"CONTAINERS_CONF": str(self._settings()), "BUILDAH_FORMAT": "docker", "STREAMFLOW_TAG": TAG}
        path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
        self.environment = {**own, **told, **variables, "PATH": path}

    def _settings(self) -> Path:
        """crun fails under mixed cgroups; and without CAP_SYS_RESOURCE no limit may be above what podman has itself."""
        files = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        lines = ["[containers]", f'default_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]']
        file = self._folder / "containers.conf"
        file.write_text("\n".join([*lines, "[engine]", 'runtime = "runc"', ""]))
        return file

    def run(self, *command: str | Path, timeout_s: float = COMMAND_S, check: bool = True) -> str:
        """What the command writes. Fails the test with all of it."""
        result = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and result.returncode:
            pytest.fail(
                f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stdout}{result.stderr}"
            )
        return result.stdout

    def __call__(self, *arguments: str | Path, timeout_s: float = COMMAND_S, check: bool = True) -> str:
        return self.run("podman", *arguments, timeout_s=timeout_s, check=check)

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        [found] = json.loads(self(kind, "inspect", name))
        answer: dict[str, Any] = found
        return answer

    def build(self, name: str) -> None:
        """As `docker compose build` would, but that nothing from outside is needed if pip needs nothing."""
        service = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"][name]
        options = ["--isolation", "chroot", "--network", "host", "--layers", *self._pip()]
        image = f"localhost/streamflow-{name}:{TAG}"
        self("build", *options, "-t", image, "-f", service["build"]["dockerfile"], ".", timeout_s=BUILD_S)

    def _pip(self) -> list[str]:
        """This machine's settings of pip, for the time of the build: mounted, so that no image has them."""
        listed = self.run(sys.executable, "-m", "pip", "config", "list").splitlines()
        said = dict(line.split("=", 1) for line in listed)
        settings = {name.rpartition(".")[2]: value.strip("'") for name, value in said.items()}
        settings.pop("cert", None)
        file = self._folder / "pip.conf"
        file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        named = [Path(part.removeprefix("file://")) for value in settings.values() for part in value.split()]
        folders = {Path("/", *part.parts[1:2]) for part in named if part.is_absolute() and part.is_dir()}
        files = {part for part in named if part.is_absolute() and part.is_file() and part.parent != _CERTIFICATES}
        mounts = [f"{file}:/etc/pip.conf:ro", *(f"{each}:{each}:ro" for each in sorted(folders | files))]
        if _CERTIFICATES.is_dir():
            mounts.append(f"{_CERTIFICATES}:{_CERTIFICATES}:ro")
        arguments = []
        if any(folder.glob("torch-*.whl") for folder in named if folder.is_dir()):
            # A wheel for CPUs is here already.
            arguments = ["--build-arg", "TORCH_INDEX="]
        return [part for mount in mounts for part in ("--volume", mount)] + arguments


@dataclass(frozen=True)
class Container:
    """One replica."""

    podman: Podman
    id: str
    service: str

    def inspect(self) -> dict[str, Any]:
        return self.podman.inspect("container", self.id)

    @property
    def running(self) -> bool:
        return bool(self.inspect()["State"]["Running"])

    @property
    def restarts(self) -> int:
        return int(self.inspect()["RestartCount"])

    def crash(self) -> None:
        """SIGKILL from outside, as a crash would be; `podman kill` would count as a wish of the operator's."""
        pid = int(self.inspect()["State"]["Pid"])
        assert pid > 1
        os.kill(pid, signal.SIGKILL)

    def execute(self, *command: str, check: bool = True) -> str:
        return self.podman("exec", self.id, *command, check=check)

    def logs(self) -> str:
        return self.podman("logs", self.id, check=False)


class Composition:
    """docker-compose.yml under a project name of its own."""

    def __init__(self, podman: Podman, project: str) -> None:
        self._podman, self.project = podman, project

    def compose(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        # In no pod: podman gives a pod one network, and the gateway is on two.
        return self._podman.run("podman-compose", "--in-pod=0", "-p", self.project, *arguments, timeout_s=timeout_s)

    def up(self, replicas: Mapping[str, int]) -> None:
        # podman-compose takes one service at a time, and leaves alone what is there of the others.
        for name, count in replicas.items():
            self.compose("up", "-d", "--no-build", "--scale", f"{name}={count}")

    def replace(self, service: str) -> None:
        """With what the variables say now; podman-compose would leave alone what is there."""
        self._podman("rm", "-f", "-t", "40", *(one.id for one in self.containers(service, all_=True)))
        self.compose("up", "-d", "--no-build", service)

    def down(self) -> None:
        # podman-compose knows the first replica alone, and podman removes nothing that others stand on.
        for needed in (False, True):
            found = [one.id for one in self.containers(all_=True) if (one.service == "redis") == needed]
            if found:
                self._podman("rm", "-f", "-t", "40", *found)
        self.compose("down", "-v")

    def containers(self, service: str = "", *, all_: bool = False) -> list[Container]:
        label = "com.docker.compose"
        wanted = [f"label={label}.project={self.project}", *([f"label={label}.service={service}"] if service else [])]
        filters = [part for each in wanted for part in ("--filter", each)]
        listed = json.loads(self._podman("ps", *(["-a"] if all_ else []), "--format", "json", *filters))
        return [Container(self._podman, one["Id"], one["Labels"][f"{label}.service"]) for one in listed]

    def left(self) -> list[str]:
        """Names of whatever there is of it."""
        found = [one.id for one in self.containers(all_=True)]
        for kind, field in (("network", "{{.Name}}"), ("volume", "{{.Name}}")):
            names: Sequence[str] = self._podman(kind, "ls", "--format", field).split()
            found += [name for name in names if name.startswith(self.project)]
        return found
