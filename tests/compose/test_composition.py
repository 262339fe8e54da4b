"""The images and the composition for real: built, started, scaled, broken and taken down.

Podman takes the place of Docker. `make test-compose` runs this, in a quarter of an hour when nothing is built yet.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from streamflow.client import AsyncClient
from streamflow.errors import StreamFlowError, UnauthenticatedError, UnavailableError
from streamflow.pipeline import Pipeline
from streamflow.ports import free_port
from tests.compose.engine import BUILT, ROOT, TAG, Composition, Container, Podman
from tests.e2e.conftest import Wish, wishes
from tests.test_compose import load

pytestmark = [pytest.mark.compose, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(2400)]

REPLICAS = {"decoder": 3, "denoiser": 2}
READY_S, PATIENCE_S = 240.0, 120.0
NEEDED = ("podman", "runc", "debootstrap", "catatonit")


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    missing = [name for name in NEEDED if not shutil.which(name) and not Path("/usr/libexec/podman", name).exists()]
    if missing:
        packages = "podman runc netavark aardvark-dns catatonit iptables debootstrap"
        pytest.skip(f"{', '.join(missing)} cannot be found; on Debian: apt-get install {packages}")
    if os.geteuid() != 0:
        pytest.skip("base images are made by root alone")
    folder = tmp_path_factory.mktemp("podman")
    secrets = folder / "secrets"
    subprocess.run(["sh", ROOT / "deploy" / "secrets.sh", secrets], check=True, capture_output=True)
    variables = {
        "STREAMFLOW_SECRETS": str(secrets),
        "STREAMFLOW_BIND": "127.0.0.1",
        "STREAMFLOW_PORT": str(free_port()),
        "STREAMFLOW_DETERMINISTIC": "true",
        **{f"STREAMFLOW_{name}_MEMORY": "3g" for name in ("ENCODER", "DENOISER", "DECODER")},
    }
    podman = Podman(folder, variables)
    working = subprocess.run(["podman", "info"], env=podman.environment, capture_output=True, text=True)
    if working.returncode:
        pytest.skip(f"podman does not work here: {working.stderr.strip()}")
    return podman


@pytest.fixture(scope="module")
def images(podman: Podman) -> dict[str, int]:
    """Builds all; their sizes in bytes."""
    [python] = {line.split("=")[1] for line in dockerfile("gateway") if line.startswith("ARG PYTHON_IMAGE=")}
    redis = load("docker-compose.yml")["services"]["redis"]["image"]
    podman.run("sh", "tests/compose/base_images.sh", python, redis, timeout_s=900)
    sizes = {}
    for name in BUILT:
        began_s = time.monotonic()
        podman.build(name)
        sizes[name] = int(podman.inspect("image", image(name))["Size"])
        print(f"\n{name}: {sizes[name] / 1e6:.0f} MB, built in {time.monotonic() - began_s:.0f} s", end="")
    return sizes


@pytest.fixture(scope="module")
def composition(podman: Podman, images: dict[str, int]) -> Iterator[Composition]:
    composition = Composition(podman, f"streamflow-test-{os.getpid()}")
    try:
        composition.up(REPLICAS)
        yield composition
    except BaseException:
        show_logs(composition)
        raise
    finally:
        composition.down()
    assert composition.left() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(composition: Composition, podman: Podman) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{podman.environment['STREAMFLOW_PORT']}") as client:

        async def live() -> bool:
            try:
                [model] = await client.models()
            except StreamFlowError:
                return False
            return model.live

        try:
            await eventually(live, timeout_s=READY_S)
        except TimeoutError:
            show_logs(composition)
            raise
        yield client


@pytest.fixture(scope="module")
def fused(shapes: Path) -> Pipeline:
    return Pipeline.from_pretrained(shapes, device="cpu", deterministic=True)


def image(name: str) -> str:
    return f"localhost/streamflow-{name}:{TAG}"


def dockerfile(name: str) -> list[str]:
    path = load("docker-compose.yml")["services"][name]["build"]["dockerfile"]
    return (ROOT / path).read_text("utf-8").splitlines()


def passwords_of(podman: Podman) -> dict[str, str]:
    folder = Path(podman.environment["STREAMFLOW_SECRETS"])
    files = (path for path in folder.iterdir() if path.is_file() and path.name != "redis_users")
    return {path.name: path.read_text() for path in files}


def show_logs(composition: Composition) -> None:
    for container in composition.containers(all_=True):
        print(f"--- {container.service} {container.id[:12]}\n{container.logs()[-4000:]}")


async def eventually(condition: Callable[[], object], *, timeout_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if (await found) if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.25)


async def all_arrive(asked: list[Wish], client: AsyncClient, fused: Pipeline) -> None:
    answers = await asyncio.gather(*(wish.ask(client, timeout_s=300) for wish in asked))
    for wish, files in zip(asked, answers, strict=True):
        assert files == wish.fuse(fused), wish


# -- images ------------------------------------------------------------------------------------------------------------


async def test_images_hold_what_their_service_needs(podman: Podman, images: dict[str, int]) -> None:
    def there(name: str, module: str) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        command = ["podman", "run", "--rm", "--network", "none", "--entrypoint", "/venv/bin/python", image(name)]
        return subprocess.run([*command, "-c", code], env=podman.environment, capture_output=True).returncode == 0

    for name in BUILT:
        # Which imports all that it stands on.
        podman("run", "--rm", "--network", "none", image(name), "--help")
    for module in ("torch", "diffusers", "transformers", "typer", "pip", "services"):
        assert not there("gateway", module), module
    for module in ("torch", "diffusers", "transformers", "onnxruntime"):
        assert there("decoder", module), module
    for module in ("pip", "gateway"):
        assert not there("decoder", module), module
    assert images["gateway"] < images["decoder"] / 3


async def test_three_stages_take_the_disk_of_one(podman: Podman, images: dict[str, int]) -> None:
    layers = {name: podman.inspect("image", image(name))["RootFS"]["Layers"] for name in BUILT}
    assert layers["encoder"] == layers["denoiser"] == layers["decoder"]


async def test_nothing_of_this_machine_is_in_an_image(podman: Podman, images: dict[str, int]) -> None:
    for name in BUILT:
        history = podman("history", "--no-trunc", image(name))
        environment = "\n".join(podman.inspect("image", image(name))["Config"]["Env"])
        for word in ("PIP_", "find-links", "PASSWORD", "PROXY"):
            assert word not in environment, name
        assert "extra-index-url" not in history.replace('--extra-index-url "$TORCH_INDEX"', ""), name
        # Where pip's settings were mounted there may be an empty file.
        looks = "ls -A /app; cat /etc/pip.conf 2>/dev/null; true"
        found = podman("run", "--rm", "--network", "none", "--entrypoint", "sh", image(name), "-c", looks).split()
        assert {"streamflow", "models"} <= set(found) <= {"streamflow", "models", "gateway", "services"}, name


# -- the composition ---------------------------------------------------------------------------------------------------


async def test_it_is_up_with_its_replicas(composition: Composition, client: AsyncClient) -> None:
    running = [one.service for one in composition.containers()]
    expected = {"redis": 1, "gateway": 1, "encoder": 1, **REPLICAS}
    assert {name: running.count(name) for name in expected} == expected
    assert len(running) == sum(expected.values())
    for one in composition.containers():

        def healthy(one: Container = one) -> bool:
            command = ["podman", "healthcheck", "run", one.id]
            return subprocess.run(command, env=one.podman.environment, capture_output=True).returncode == 0

        await eventually(healthy)


async def test_containers_have_no_rights(composition: Composition, client: AsyncClient, podman: Podman) -> None:
    passwords = passwords_of(podman)
    for one in composition.containers():
        status = dict(line.split(":", 1) for line in one.execute("cat", "/proc/1/status").splitlines())
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, one.service
        assert status["NoNewPrivs"].strip() == "1", one.service
        assert one.execute("id", "-u").strip() == ("999" if one.service == "redis" else "65534")
        assert "ead-only" in one.execute("sh", "-c", "touch /probe 2>&1; true"), one.service
        inspected = one.inspect()
        assert inspected["HostConfig"]["Memory"] > 0
        assert inspected["HostConfig"]["PidsLimit"] > 0
        # Neither in the environment nor in the arguments, which whoever may ask the engine can read.
        text = json.dumps(inspected)
        assert not [name for name, password in passwords.items() if password in text], one.service
        published = {port for port, hosts in inspected["NetworkSettings"]["Ports"].items() if hosts}
        assert published == ({"50051/tcp"} if one.service == "gateway" else set()), one.service


async def test_stages_have_no_way_out(composition: Composition, client: AsyncClient) -> None:
    for one in composition.containers():
        routes = one.execute("cat", "/proc/net/route").splitlines()[1:]
        ways_out = [route for route in routes if route.split()[1] == "00000000"]
        assert bool(ways_out) == (one.service == "gateway"), one.service


async def test_redis_knows_each_service_by_a_user_of_its_own(composition: Composition, client: AsyncClient) -> None:
    [redis] = composition.containers("redis")
    assert "NOAUTH" in redis.execute("redis-cli", "ping", check=False)
    asks = 'REDISCLI_AUTH="$(cat /run/secrets/redis_administrator)" redis-cli --user administrator '
    for name, value in (("appendfsync", "always"), ("appendonly", "yes"), ("maxmemory-policy", "noeviction")):
        assert redis.execute("sh", "-c", f"{asks} config get {name}").split() == [name, value]
    connected = redis.execute("sh", "-c", f"{asks} client list").splitlines()
    users = {field.removeprefix("user=") for line in connected for field in line.split() if field.startswith("user=")}
    assert users == {*BUILT, "administrator"}
    assert redis.execute("sh", "-c", f"{asks} acl log").split() == []
    # Each container has its own password and no other.
    for one in composition.containers():
        expected = {f"redis_{one.service}"} if one.service in BUILT else {"redis_users", "redis_administrator"}
        assert set(one.execute("ls", "/run/secrets").split()) == expected


async def test_pictures_are_those_of_the_fused_pipeline(client: AsyncClient, fused: Pipeline) -> None:
    await all_arrive(wishes(8, first_seed=1), client, fused)


async def test_a_decoder_and_a_denoiser_die_in_the_middle_of_fifty_requests(
    composition: Composition, client: AsyncClient, fused: Pipeline
) -> None:
    asked = wishes(50, first_seed=3)
    answers = asyncio.ensure_future(all_arrive(asked, client, fused))
    victims = [composition.containers(name)[0] for name in ("decoder", "denoiser")]
    for victim in victims:
        await asyncio.sleep(1.5)
        assert not answers.done()
        victim.crash()
    await answers
    for victim in victims:
        # Docker and podman start them again by themselves.
        await eventually(lambda victim=victim: victim.running and victim.restarts >= 1)


async def test_a_restart_of_redis_loses_nothing(
    composition: Composition, client: AsyncClient, fused: Pipeline, podman: Podman
) -> None:
    asked = wishes(20, first_seed=5)
    answers = asyncio.ensure_future(all_arrive(asked, client, fused))
    await asyncio.sleep(1.0)
    assert not answers.done()
    [redis] = composition.containers("redis")
    await asyncio.to_thread(podman, "restart", redis.id)
    await answers


async def test_replicas_go_and_come_while_there_is_work(
    composition: Composition, client: AsyncClient, fused: Pipeline, podman: Podman
) -> None:
    answers = asyncio.ensure_future(all_arrive(wishes(30, first_seed=7), client, fused))
    leaving = [composition.containers("decoder")[-1], composition.containers("denoiser")[-1]]
    for one in leaving:
        await asyncio.to_thread(podman, "stop", "-t", "40", one.id)
        # It finished or handed back what it held.
        assert one.inspect()["State"]["ExitCode"] == 0, one.logs()[-2000:]
    assert len(composition.containers("decoder")) == REPLICAS["decoder"] - 1
    await asyncio.to_thread(composition.up, REPLICAS)
    await answers
    await eventually(lambda: len(composition.containers("decoder")) == REPLICAS["decoder"])
    await eventually(lambda: len(composition.containers("denoiser")) == REPLICAS["denoiser"])
    await all_arrive(wishes(6, first_seed=11), client, fused)


async def test_at_last_the_gateway_asks_for_keys_where_a_variable_says_so(
    composition: Composition, client: AsyncClient, fused: Pipeline, podman: Podman
) -> None:
    keys = Path(podman.environment["STREAMFLOW_SECRETS"], "access", "keys.txt")
    made = podman.run(sys.executable, "-m", "streamflow.cli", "keys", "create", "alice", "--file", keys)
    [key] = re.findall(r"sf_[\w-]+", made)
    await asyncio.to_thread(keys.chmod, 0o644)
    podman.environment["STREAMFLOW_GATEWAY_KEYS_FILE"] = "/access/keys.txt"
    await asyncio.to_thread(composition.replace, "gateway")

    async def asks() -> bool:
        try:
            await client.models()
        except UnauthenticatedError:
            return True
        except UnavailableError:
            return False
        return False

    await eventually(asks)
    async with AsyncClient(client.address, api_key=key) as alice:
        await all_arrive(wishes(2, first_seed=13), alice, fused)
