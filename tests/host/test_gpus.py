"""Which GPU a replica gets: processes, a real Redis, and a program that lists GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from streamflow.config import child_environment
from streamflow.ports import free_port
from streamflow.transport.embedded import EmbeddedRedis
from tests import nvidia_smi

REPOSITORY = Path(__file__).parents[2]
RENEW_EVERY_S = 0.3
LAPSE_S = 3 * RENEW_EVERY_S

Start = Callable[..., "Holder"]


class Holder:
    """A replica that has chosen its GPU and does nothing with it."""

    def __init__(self, stage: str, environment: dict[str, str], log: Path, *, renew_every_s: float) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.host.gpu_holder", stage, str(renew_every_s)],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        answer: dict[str, Any] = json.loads(line)
        assert not answer["torch"]
        return answer

    def number(self) -> str | None:
        told = self.told()
        assert told["visible"] == (told["number"] and nvidia_smi.uuid(int(told["number"])))
        number: str | None = told["number"]
        return number

    def log(self) -> str:
        return self._log.read_text()

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(20) == 0, self.log()

    def kill(self) -> None:
        self.process.kill()
        with self.process:  # waits for it, and closes the pipes
            pass


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def start(redis: EmbeddedRedis, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    holders: list[Holder] = []
    with ExitStack() as stack:

        def start(
            stage: str = "denoise", *, gpus: int = 4, renew_every_s: float = RENEW_EVERY_S, **settings: object
        ) -> Holder:
            cuda = {"CUDA_VISIBLE_DEVICES": str(settings.pop("visible"))} if "visible" in settings else {}
            own = {"redis_url": redis.url, "deployment": f"gpus-{len(request.node.name)}-{os.getpid()}", **settings}
            path = nvidia_smi.install(tmp_path / f"{gpus}-gpus", gpus) + os.pathsep + os.environ["PATH"]
            environment = {**child_environment(own), "PATH": path, **cuda}
            holder = Holder(stage, environment, tmp_path / f"log-{len(holders)}", renew_every_s=renew_every_s)
            holders.append(holder)
            stack.callback(holder.kill)
            return holder

        yield start


def test_replicas_that_start_together_share_the_gpus_out(start: Start) -> None:
    holders = [start() for _ in range(8)]
    assert Counter(holder.number() for holder in holders) == {"0": 2, "1": 2, "2": 2, "3": 2}


def test_a_denoiser_counts_for_more_than_decoders(start: Start) -> None:
    assert start("denoise", gpus=2).number() == "0"
    # Two decoders weigh as much as a denoiser.
    assert [start("decode", gpus=2).number() for _ in range(3)] == ["1", "1", "0"]


def test_the_gpu_of_a_killed_replica_is_free_when_its_lease_lapsed(start: Start) -> None:
    taken = {holder.number(): holder for holder in [start(gpus=3) for _ in range(3)]}
    assert set(taken) == {"0", "1", "2"}
    # Renewed while they live: all are as full.
    time.sleep(2 * LAPSE_S)
    assert start("encode", gpus=3).number() == "0"
    taken["2"].kill()
    time.sleep(LAPSE_S + 0.5)
    # Were it still counted, it would be the second one.
    assert start(gpus=3).number() == "2"


def test_who_is_started_again_after_a_crash_is_where_it_was(start: Start) -> None:
    own = {"port": free_port(), "gpus": 2, "renew_every_s": 60}
    crashing = start("denoise", **own)
    assert crashing.number() == "0"
    assert start("decode", gpus=2, renew_every_s=60).number() == "1"
    crashing.kill()
    # Its lease has not lapsed, so that the other GPU looks as if it had less work.
    assert start("denoise", **own).number() == "0"
    # And it counts once: two encoders weigh as much as a decoder.
    assert [start("encode", gpus=2, renew_every_s=60).number() for _ in range(3)] == ["1", "1", "0"]


def test_who_leaves_in_order_gives_back_at_once(start: Start) -> None:
    started = [start(gpus=2, renew_every_s=60) for _ in range(2)]
    holders = {holder.number(): holder for holder in started}
    holders["1"].leave()
    assert start(gpus=2).number() == "1"


def test_a_gpu_that_was_named_counts_as_taken(start: Start) -> None:
    assert start(gpu="0", gpus=2).number() == "0"
    assert start(gpu=nvidia_smi.uuid(0), gpus=2).number() == "0"

    deadline_s = time.monotonic() + 20
    while (holder := start("encode", gpus=2)).number() != "1":
        # Whoever needs no answer does not wait for one.
        assert time.monotonic() < deadline_s
        holder.leave()


@pytest.mark.parametrize(
    "settings",
    [{"gpus": 1}, {"gpus": 0}, {"gpu": "none"}, {"device": "cpu"}, {"device": "cuda:1"}],
    ids=["one", "no-gpu", "none", "cpu", "a-device"],
)
def test_where_there_is_nothing_to_choose_nothing_is_hidden(start: Start, settings: dict[str, Any]) -> None:
    # Nor is Redis needed for it.
    told = start(redis_url=f"redis://127.0.0.1:{free_port()}/0", **settings).told()
    assert told["number"] is None
    assert told["visible"] == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_what_cuda_does_not_see_is_not_chosen(start: Start) -> None:
    assert {start(visible="3,1").number() for _ in range(2)} == {"3", "1"}
    assert start(visible="2").told()["visible"] == "2"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gpu": "7"}, "gpu: got '7'; allowed: number or UUID of one of 0 (NVIDIA Test 0), 1 (NVIDIA Test 1)"),
        ({"gpu": "1", "visible": "0"}, "gpu: got '1'; allowed: number or UUID of one of 0 (NVIDIA Test 0)"),
        ({"gpu": "0", "gpus": 0}, "no GPU is to be seen"),
    ],
)
def test_a_gpu_that_is_not_there_ends_the_process(start: Start, settings: dict[str, Any], says: str) -> None:
    holder = start(**{"gpus": 2, **settings})
    assert holder.process.wait(30) == 2
    assert says in holder.log()


def test_the_choice_waits_for_redis(start: Start, tmp_path: Path) -> None:
    port = free_port()
    holder = start(gpus=2, redis_url=f"redis://127.0.0.1:{port}/0")
    deadline_s = time.monotonic() + 30
    while "no lease on a GPU" not in holder.log():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    data = tmp_path / "redis"
    data.mkdir()
    server = ["redis-server", "--port", str(port), "--dir", str(data), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(server, stdout=subprocess.DEVNULL) as redis:
        try:
            assert holder.number() == "0"
        finally:
            redis.kill()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"redis_url": "http://127.0.0.1/0"}, "redis_url: got"),
        ({"redis_password_file": "/nowhere"}, "redis_password_file: got"),
        ({"redis_url": "rediss://127.0.0.1/0", "redis_ca": "/nowhere"}, "redis_ca: got"),
        ({"redis_url": "http://127.0.0.1/0", "gpu": "1"}, None),
    ],
    ids=["url", "password", "ca", "named"],
)
def test_a_redis_that_cannot_be_asked_ends_the_choice(start: Start, settings: dict[str, Any], says: str | None) -> None:
    holder = start(gpus=2, **settings)
    if says is None:
        # There was nothing to ask; loading the model comes to it again.
        assert holder.number() == "1"
    else:
        assert holder.process.wait(30) == 2
        assert says in holder.log()
    assert "Traceback" not in holder.log()


def test_who_comes_back_after_its_lease_lapsed_is_where_it_was(start: Start, redis: EmbeddedRedis) -> None:
    with Redis.from_url(redis.url, decode_responses=True) as store:

        def leased() -> dict[str, str]:
            """By holder."""
            (key,) = store.keys("sf:v1:{gpus-*:gpus")
            return {holder: said.rpartition(" ")[2] for holder, said in store.hgetall(key).items()}

        store.flushall()
        stopped = start(gpus=2)
        assert stopped.number() == "0"
        (name,) = leased()
        os.kill(stopped.process.pid, signal.SIGSTOP)
        time.sleep(LAPSE_S)
        assert start(gpus=2).number() == "0"
        assert name not in leased()
        os.kill(stopped.process.pid, signal.SIGCONT)
        deadline_s = time.monotonic() + 20
        while name not in leased():
            assert time.monotonic() < deadline_s, stopped.log()
            time.sleep(0.05)
        assert leased()[name] == nvidia_smi.uuid(0)
        # So the other one has less to do.
        assert start(gpus=2).number() == "1"


@pytest.mark.parametrize("service", ["encoder", "denoiser", "decoder"])
def test_services_choose_before_they_load(service: str, redis: EmbeddedRedis, tmp_path: Path) -> None:
    path = nvidia_smi.install(tmp_path, 2) + os.pathsep + os.environ["PATH"]
    environment = {**child_environment({"redis_url": redis.url, "gpu": "5"}), "PATH": path}
    answer = subprocess.run(
        [sys.executable, "-m", f"services.{service}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 2
    assert "gpu: got '5'" in answer.stderr
    assert "Traceback" not in answer.stderr
