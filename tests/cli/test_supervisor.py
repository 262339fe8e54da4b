"""Local deployments: real processes and a real Redis, with services that do nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
import trustme

from streamflow.cli import up
from streamflow.cli.process import Command, Supervised
from streamflow.cli.supervisor import LocalDeployment, serving
from streamflow.errors import InvalidRequestError, NotFoundError, StreamFlowError, UnavailableError
from streamflow.gpus import read_listing
from tests import nvidia_smi
from tests.cli.light_up import LIGHT, SHAPES

REPOSITORY = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(pids: list[int]) -> None:
    give_up_s = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < give_up_s, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


async def test_a_deployment_starts_is_mended_grows_and_stops(tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []
    async with LocalDeployment(
        model=SHAPES,
        slots=3,
        deterministic=True,
        commands=LIGHT,
        log_dir=tmp_path,
        on_line=lambda name, line: lines.append((name, line)),
    ) as deployment:
        await _try_out(deployment, lines)
        pids = [process.pid for process in deployment.processes.values()]
        lines.clear()
    # In order: no new requests first.
    assert lines[0] == ("gateway", "stopping")
    assert {name for name, line in lines if line == "stopping"} == {"gateway", "encoder-1", "denoiser-1", "decoder-1"}
    assert not any(alive(pid) for pid in pids)
    assert (tmp_path / "gateway.log").read_text().splitlines()[-1] == "stopping"


async def _try_out(deployment: LocalDeployment, lines: list[tuple[str, str]]) -> None:
    assert set(deployment.processes) == {"redis", "gateway", "encoder-1", "denoiser-1", "decoder-1"}
    await serving(deployment.address, "streamflow.v1.Gateway")
    assert ("denoiser-1", "slots 3 deterministic True") in lines
    assert ("decoder-1", "slots None deterministic True") in lines

    # A crash is mended, at the same address.
    old = deployment.processes["encoder-1"].pid
    await deployment.kill("encoder-1")
    assert not alive(old)
    await deployment.wait_ready("encoder-1")
    assert alive(deployment.processes["encoder-1"].pid)
    assert deployment.processes["encoder-1"].restarts == 1

    # So is one of Redis, and it keeps what it had.
    with redis.Redis.from_url(deployment.redis_url) as store:
        store.set("kept", "yes")
    await deployment.kill("redis")
    await deployment.wait_ready("redis")
    with redis.Redis.from_url(deployment.redis_url) as store:
        assert store.get("kept") == b"yes"

    # A restart is orderly, and ready when it returns.
    old = deployment.processes["gateway"].pid
    await deployment.restart("gateway")
    assert ("gateway", "stopping") in lines
    assert deployment.processes["gateway"].pid != old
    assert not alive(old)

    # Replicas come and go.
    assert await deployment.add("decoder") == "decoder-2"
    pid = deployment.processes["decoder-2"].pid
    assert deployment.addresses["decoder-2"] != deployment.addresses["decoder-1"]
    await deployment.remove("decoder-2")
    assert not alive(pid)
    assert "decoder-2" not in deployment.processes
    with pytest.raises(NotFoundError, match="gateway"):
        await deployment.kill("decoder-2")
    with pytest.raises(InvalidRequestError):
        await deployment.add("gateway")


async def test_gpus_are_given_out(tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []
    gpus = read_listing(nvidia_smi.listing(4))
    async with LocalDeployment(
        model=SHAPES,
        commands=LIGHT,
        denoisers=2,
        decoders=4,
        gpus=gpus,
        on_line=lambda name, line: lines.append((name, line)),
    ) as deployment:
        given = {name: deployment.gpu_of(name) for name in deployment.processes}
        assert {name: gpu.number for name, gpu in given.items() if gpu} == {
            "encoder-1": "0",
            "denoiser-1": "0",
            "denoiser-2": "1",
            "decoder-1": "2",
            "decoder-2": "3",
            "decoder-3": "2",
            "decoder-4": "3",
        }
        for name, gpu in given.items():
            if name != "redis":
                assert (name, f"gpu {gpu and gpu.uuid}") in lines
        # One more goes where there is room now, which a crash does not change.
        await deployment.remove("denoiser-2")
        assert await deployment.add("decoder") == "decoder-5"
        assert deployment.gpu_of("decoder-5") == gpus[1]
        await deployment.kill("decoder-5")
        await deployment.wait_ready("decoder-5")
        assert lines.count(("decoder-5", f"gpu {gpus[1].uuid}")) == 2


async def test_every_model_has_replicas_of_its_own() -> None:
    lines: list[tuple[str, str]] = []
    async with LocalDeployment(
        model=SHAPES,
        more_models={"rings": SHAPES, "stars": SHAPES},
        commands=LIGHT,
        denoisers=2,
        decoders=0,
        settings={"deployment": "test"},
        on_line=lambda name, line: lines.append((name, line)),
    ) as deployment:
        await _try_out_models(deployment, lines)
    assert {name for name, line in lines if line == "stopping"} >= {"encoder-1", "rings-encoder-1", "stars-encoder-1"}


async def _try_out_models(deployment: LocalDeployment, lines: list[tuple[str, str]]) -> None:
    assert deployment.models == ["shapes", "rings", "stars"]
    replicas = ["encoder-1", "denoiser-1", "denoiser-2"]
    by_model = {"": ["redis", "gateway"], "shapes": replicas}
    by_model |= {model: [f"{model}-{name}" for name in replicas] for model in ("rings", "stars")}
    assert {name: deployment.model_of(name) for name in deployment.processes} == {
        name: model for model, names in by_model.items() for name in names
    }
    # The gateway is told of all, the stages of each which one is theirs.
    everything = f"rings={SHAPES.absolute()},stars={SHAPES.absolute()}"
    assert ("gateway", f"test None {everything}") in lines
    assert ("denoiser-2", f"test None {everything}") in lines
    assert ("rings-denoiser-2", f"test-rings rings {everything}") in lines

    assert await deployment.add("decoder") == "decoder-1"
    assert await deployment.add("decoder", "rings") == "rings-decoder-1"
    assert deployment.model_of("rings-decoder-1") == "rings"
    await deployment.remove("rings-decoder-1")
    assert "rings-decoder-1" not in deployment.addresses
    with pytest.raises(InvalidRequestError, match="model: got 'squares'; allowed: shapes, rings, stars"):
        await deployment.add("decoder", "squares")


def test_further_models_that_cannot_be_served_are_told_at_once(tmp_path: Path) -> None:
    comma = tmp_path / "a,b"
    comma.mkdir()
    (comma / "model_index.json").write_bytes((SHAPES / "model_index.json").read_bytes())
    cases: list[tuple[dict[str, str | Path], str]] = [
        ({"shapes": SHAPES}, "more_models: got 'shapes'; allowed: a name other than the default model's"),
        ({"v1.5": SHAPES}, "more_models: got 'v1.5'; allowed: A-Z a-z 0-9 _ -, and at most 40 of them in default-NAME"),
        ({"": SHAPES}, "more_models: got ''"),
        ({"x" * 33: SHAPES}, "give it another name, as NAME=PATH"),
        ({"rings": "/nowhere"}, "model: got '/nowhere'"),
        ({"rings": comma}, "allowed: a folder without a comma in its path"),
    ]
    for models, says in cases:
        with pytest.raises(InvalidRequestError) as refusal:
            LocalDeployment(model=SHAPES, more_models=models)
        assert says in str(refusal.value)


async def test_the_callers_own_error_comes_out_as_it_is() -> None:
    deployment = LocalDeployment(model=SHAPES, commands=LIGHT, encoders=0, denoisers=0, decoders=0)
    pids: list[int] = []

    async def fail() -> None:
        async with deployment:
            pids.extend(process.pid for process in deployment.processes.values())
            raise KeyError("mine")

    with pytest.raises(KeyError):
        await fail()
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


async def test_a_process_that_cannot_start_is_told_with_its_last_words() -> None:
    broken = (sys.executable, "-c", "import sys; sys.exit('no such checkpoint')")
    started: list[psutil.Process] = []
    with pytest.raises(UnavailableError, match="denoiser-1 ended with exit code 1:\nno such checkpoint"):
        async with LocalDeployment(model=SHAPES, commands={**LIGHT, "denoiser": broken}):
            pytest.fail("it must not be entered")
    started = psutil.Process().children(recursive=True)
    assert not [child for child in started if "light_service" in " ".join(child.cmdline())]


async def test_a_checkpoint_that_cannot_be_served_is_refused_before_anything_starts(tmp_path: Path) -> None:
    copy = shutil.copytree(SHAPES, tmp_path / "copy")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    for models in ({"model": copy}, {"model": SHAPES, "more_models": {"other": copy}}):
        lines: list[str] = []
        deployment = LocalDeployment(**models, commands=LIGHT, on_line=lambda name, line, to=lines: to.append(line))
        with pytest.raises(
            InvalidRequestError, match=r"vae.*a whole safetensors file; it is cut or damaged: it is empty"
        ):
            async with deployment:
                pytest.fail("it must not be entered")
        assert not lines


async def test_a_process_that_never_gets_ready_is_given_up() -> None:
    silent = (sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)")
    deployment = LocalDeployment(
        model=SHAPES, commands={**LIGHT, "gateway": silent}, encoders=0, denoisers=0, decoders=0, ready_timeout_s=2
    )
    with pytest.raises(UnavailableError, match="gateway is not ready after 2 s"):
        await deployment.__aenter__()
    assert not any(process.running for process in deployment.processes.values())


def test_a_model_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(StreamFlowError, match="/nowhere"):
        LocalDeployment(model="/nowhere")


@pytest.fixture
def running() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`streamflow up` as a process of its own, and the ids of its children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.light_up"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, list(json.loads(line).values())
        process.kill()


@pytest.mark.parametrize("keys", [True, False])
async def test_what_up_suggests_has_a_key_where_one_is_asked_for(
    keys: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.txt").write_text(f"sha256:{'a' * 64} alice\n")
    monkeypatch.setenv("STREAMFLOW_API_KEYS_FILE", str(tmp_path / "keys.txt") if keys else "")
    async with LocalDeployment(model=SHAPES, commands=LIGHT, encoders=0, denoisers=0, decoders=0) as deployment:
        up._print_table(deployment)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Try: ")]
    assert line.endswith(" --api-key KEY") == keys


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_stops_on_a_signal(running: tuple[subprocess.Popen[str], list[int]], number: signal.Signals) -> None:
    process, pids = running
    assert all(alive(pid) for pid in pids)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "StreamFlow is ready" in output
    assert "streamflow generate" in output
    assert errors.endswith("stopped\n")
    assert not any(alive(pid) for pid in pids)


def test_children_die_with_a_supervisor_that_is_killed(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, pids = running
    os.kill(process.pid, signal.SIGKILL)
    wait_until_gone(pids)


async def test_a_process_that_is_down_is_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id may be somebody else's by then."""

    async def at_once() -> None:
        pass

    command = Command(["sleep", "600"], environment=os.environ, on_line=print)
    process = Supervised("sleeper", command, probe=at_once, on_line=print)
    keeping = asyncio.create_task(process.run())
    try:
        await _until_it_runs(process)
        await process.wait_ready(5)
        assert process.last_ending == ""
        assert await process.kill()
        assert process.last_ending == "signal SIGKILL"
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", lambda *_: pytest.fail("somebody was signalled"))
            assert not process.running
            assert not await process.kill()
            await process.restart()
        await _until_it_runs(process)
        assert process.restarts == 1
        # That was no restart: after its next crash it waits again.
        await process.kill()
        began_s = time.monotonic()
        await _until_it_runs(process)
        assert time.monotonic() - began_s > 0.2
    finally:
        await process.stop()
        await keeping


async def test_how_a_process_ended_is_kept() -> None:
    async def at_once() -> None:
        pass

    # It ends in order, as our services do; "ready" says that the trap is set.
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    lines: asyncio.Queue[str] = asyncio.Queue()
    command = Command([sys.executable, "-c", program], environment=os.environ, on_line=lines.put_nowait)
    process = Supervised("orderly", command, probe=at_once, on_line=print)
    keeping = asyncio.create_task(process.run())
    assert await lines.get() == "ready"
    await process.wait_ready(5)
    await process.restart()
    assert process.last_ending == "exit code 0"
    assert await lines.get() == "ready"
    await process.kill()
    assert process.last_ending == "signal SIGKILL"
    await process.stop()
    await keeping
    assert process.last_ending == "signal SIGKILL"


async def _until_it_runs(process: Supervised) -> None:
    async with asyncio.timeout(10):
        while not process.running:  # noqa: ASYNC110 - a process
            await asyncio.sleep(0.01)


async def test_waiting_for_an_exit_leaves_no_descriptor_open() -> None:
    before = psutil.Process().num_fds()
    async with LocalDeployment(model=SHAPES, commands=LIGHT, encoders=0, denoisers=0, decoders=0) as deployment:
        await deployment.kill("gateway")
        await deployment.wait_ready("gateway")
    await asyncio.sleep(0)
    assert psutil.Process().num_fds() <= before


async def test_what_no_process_could_mend_is_refused_before_any_is_started(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    file = tmp_path / "file"
    file.touch()
    cases: list[tuple[dict[str, object], str]] = [
        ({"port": taken.getsockname()[1]}, "a free port of this machine"),
        (
            {"settings": {"metrics_port": taken.getsockname()[1]}},
            "metrics_port: .* choose another one with --metrics-port",
        ),
        ({"port": 9464, "settings": {"metrics_port": 9464}}, "metrics_port: got 9464; allowed: another port"),
        ({"settings": {"traces": "file:/nowhere/traces"}}, "traces: got .*No such file or directory"),
        ({"settings": {"api_keys_file": tmp_path / "nowhere"}}, "api_keys_file: got .*nowhere"),
        ({"settings": {"tls_cert": file}}, "tls_cert: got .*; allowed: tls_cert and tls_key together"),
        ({"settings": {"tls_cert": file, "tls_key": file}}, "tls_cert: got .*; allowed: a PEM file, with its key"),
        ({"log_dir": file}, "a folder"),
        ({"redis_url": "redis://127.0.0.1:1/0"}, "the Redis at 127.0.0.1:1 cannot be used"),
        ({"redis_url": "garbage"}, "redis_url: got 'garbage'; allowed: redis://HOST:PORT/0"),
        ({"redis_url": "redis://:secret@[bad"}, r"redis_url: got '\[bad'; allowed"),
        ({"redis_url": "redis://127.0.0.1:1/abc"}, "redis_url: got 'redis://127.0.0.1:1/abc'; allowed: a number"),
    ]
    with taken:
        for options, says in cases:
            with pytest.raises(StreamFlowError, match=says):
                async with LocalDeployment(model=SHAPES, **options):  # type: ignore[arg-type]
                    raise AssertionError("it started")


async def test_a_gateway_with_tls_is_probed_with_its_own_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of another Redis than the private one, which has a password of its own.
    monkeypatch.setenv("STREAMFLOW_REDIS_PASSWORD_FILE", str(tmp_path / "nowhere"))
    authority = trustme.CA()
    issued = authority.issue_cert("gateway.example.org")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    lines: list[tuple[str, str]] = []
    commands = {**LIGHT, "gateway": (sys.executable, "-m", "gateway")}
    async with LocalDeployment(
        model=SHAPES,
        commands=commands,
        encoders=0,
        denoisers=0,
        decoders=0,
        settings={"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"},
        on_line=lambda name, line: lines.append((name, line)),
    ) as deployment:
        assert deployment.tls_cert == tmp_path / "cert.pem"
        await deployment.restart("gateway")
    # Nobody knocked without TLS, which gRPC would complain about.
    assert not [line for _, line in lines if "handshake" in line.lower() or "ssl" in line.lower()]
