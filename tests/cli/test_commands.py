"""The commands against a real gateway."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from streamflow.cli.app import app
from streamflow.cli.progress import half_blocks
from streamflow.client import Client
from streamflow.config import default_model
from streamflow.types import JobState
from tests.client.deployment import Deployment, in_thread

SHAPES = str(default_model().absolute())
COMMANDS = ("up", "generate", "edit", "samplers", "status", "models", "jobs", "cancel", "redis-acl")


@pytest.fixture
def deployment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Deployment]:
    with Deployment() as deployment:
        monkeypatch.setenv("STREAMFLOW_ADDRESS", deployment.address)
        monkeypatch.chdir(tmp_path)
        yield deployment


def opened(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    examples = result.output.split("Examples:")[1].split("\n\n")[0]
    assert f"streamflow {command}" in examples


def test_the_help_lists_every_command() -> None:
    listed = run("--help").output
    assert all(f"\n  {command} " in listed for command in COMMANDS)


def test_generate_writes_the_picture(deployment: Deployment) -> None:
    result = run("generate", "a red circle", "-o", "circle.png", "--seed", "7", "--width", "32", "--height", "40")
    assert result.exit_code == 0, result.output
    assert result.stdout == "circle.png  (seed 7)\n"
    assert opened("circle.png").size == (32, 40)


def test_the_format_follows_from_the_file(deployment: Deployment) -> None:
    assert run("generate", "a red circle", "-o", "circle.webp").exit_code == 0
    assert opened("circle.webp").format == "WEBP"
    assert run("generate", "a red circle", "-o", "circle.jpg", "--format", "png").exit_code == 0
    assert opened("circle.jpg").format == "PNG"


def test_several_prompts_a_pattern_and_json(deployment: Deployment) -> None:
    result = run("generate", "a ring", "a star", "-n", "2", "-o", "out/{index}-{seed}.png", "--seed", "5", "--json")
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout)
    assert [image["path"] for image in about["images"]] == [f"out/{k}-{5 + k}.png" for k in range(4)]
    assert all(Path(image["path"]).is_file() for image in about["images"])
    assert about["seed"] == 5
    assert about["timings"]["decode_ms"] == 4


def test_a_file_named_in_full_is_replaced_and_a_made_name_is_not(deployment: Deployment) -> None:
    Path("a.png").write_text("old")
    Path("b-0.png").write_text("old")
    assert run("generate", "a ring", "-o", "a.png").exit_code == 0
    assert opened("a.png").size == (64, 64)
    refused = run("generate", "a ring", "-n", "2", "-o", "b.png")
    assert refused.exit_code == 2
    assert "b-0.png exists" in refused.stderr
    assert deployment.worker.painted == [f"{_jobs(deployment)[0]}:0"]
    assert run("generate", "a ring", "-n", "2", "-o", "b.png", "--overwrite").exit_code == 0
    assert opened("b-0.png").size == (64, 64)


@pytest.mark.parametrize("name", ["a.png", "new/deeper/a.png", "link.png", "new/../b.png"])
def test_a_place_is_tried_before_the_request_and_left_as_it_was(deployment: Deployment, name: str) -> None:
    Path("link.png").symlink_to("target.png")
    before = sorted(Path().iterdir())
    assert run("generate", "a ring", "--steps", "1000", "-o", name).exit_code == 2
    assert sorted(Path().iterdir()) == before
    Path("new").mkdir()
    assert run("generate", "a ring", "-o", name).exit_code == 0
    assert opened(name).size == (64, 64)
    assert Path("link.png").is_symlink()


def test_previews_are_written_beside(tmp_path: Path) -> None:
    with Deployment(permits=0) as deployment:
        # Previews are lossy: they are made only once the command watches.
        worker = in_thread(lambda: (deployment.wait_for_watcher(), deployment.allow(1)))
        arguments = ["--steps", "4", "--preview-every", "2", "--address", deployment.address]
        result = run("generate", "a ring", "-o", str(tmp_path / "ring.png"), *arguments)
        worker.join()
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"ring.png", "ring-step02.jpg", "ring-step04.jpg"}
    assert opened(tmp_path / "ring-step04.jpg").size == (16, 16)


def test_a_preview_as_text_has_two_pixels_a_character() -> None:
    image = Image.new("RGB", (2, 2), "red")
    image.putpixel((0, 1), (0, 0, 255))
    text = half_blocks(image, columns=2)
    assert text.plain == "▀▀\n"
    assert [str(span.style) for span in text.spans] == ["#ff0000 on #0000ff", "#ff0000 on #ff0000"]


def test_img2img(deployment: Deployment) -> None:
    Image.new("RGB", (64, 64), "red").save("red.png")
    result = run("generate", "a ring", "--init-image", "red.png", "--strength", "0.5", "-o", "ring.png")
    assert result.exit_code == 0, result.output


def test_edit_sends_the_picture_and_what_it_shows(deployment: Deployment) -> None:
    Image.new("RGB", (64, 64), "red").save("red.png")
    told = run("edit", "red.png", "a ring", "--source-prompt", "a circle", "--steps", "8", "-o", "a.png", "--json")
    assert told.exit_code == 0, told.output
    (image,) = json.loads(told.stdout)["images"]
    assert (image["sampler"], image["steps"]) == ("flowedit", 8)
    redrawn = run("edit", "red.png", "a ring", "--strength", "0.5", "-o", "b.png", "--json")
    assert json.loads(redrawn.stdout)["images"][0]["sampler"] == "euler"


def test_guidance_options_reach_the_gateway(deployment: Deployment) -> None:
    asked = ("generate", "a ring", "-o", "a.png", "--guidance-scale", "3")
    assert run(*asked, "--guidance-interval", "0.9:0.2", "--guidance-mode", "full").exit_code == 0
    refused = run(*asked, "--guidance-interval", "0.2:0.9")
    assert refused.stderr == (
        "streamflow: guidance_interval: got '0.2 down to 0.9'; "
        "allowed: two sigmas from 1 (noise) to 0 (data), the larger first\n"
    )
    assert "full, self-negative, onetime-negative" in run(*asked, "--guidance-mode", "half").stderr
    assert "0.9:0.2" in run(*asked, "--guidance-interval", "0.9").stderr
    residual = run(*asked, "--guidance-mode", "self-negative", "--sampler", "heun")
    assert "need the sampler euler" in residual.stderr


def test_samplers_are_listed_and_shown() -> None:
    listed = run("samplers").output
    assert all(name in listed for name in ("euler", "pseudo", "perflow", "flowedit", "H2P4R2"))
    shown = run("samplers", "show", "H1P1R1", "--guidance-scale", "2").output
    assert "5 network evaluations, 8 rows" in shown
    assert "refiner" in shown
    perflow = run("samplers", "show", "perflow[prediction=diff_eps]", "--steps", "4").output
    assert "3.485786" in perflow


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["R2"], 2, "streamflow: sampler: got 'R2'; allowed: a first block"),
        (["blocks"], 2, "streamflow: sampler: got 'blocks'"),
        (["euler", "--steps", "0"], 2, "--steps"),
        (["euler", "--steps", "-1"], 2, "--steps"),
        (
            ["perflow[prediction=diff_eps]", "--steps", "2000"],
            2,
            "steps: got 2000; allowed: at most 996 with 4 windows",
        ),
        (["euler", "--guidance-scale", "nan"], 2, "guidance_scale: got nan"),
        (["euler", "--guidance-scale", "-5"], 2, "guidance_scale: got -5.0; allowed: 0 to 100"),
    ],
)
def test_samplers_that_cannot_be_shown_are_refused(arguments: list[str], code: int, says: str) -> None:
    refused = run("samplers", "show", *arguments)
    assert refused.exit_code == code
    assert says in refused.stderr
    assert isinstance(refused.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "a ring", "--steps", "0"], 2, "steps"),
        (["generate", "a ring", "--sampler", "H2X1"], 2, "there is no X"),
        (["generate", "a ring", "--width", "0"], 2, "--width"),
        (["edit", "nowhere.png", "a ring"], 2, "nowhere.png"),
        (["generate", "a ring", "--init-image", "/dev/null"], 2, "/dev/null"),
        (["generate", "a ring", "-o", "a.bmp"], 2, ".webp"),
        (["generate", "a ring", "--init-image", "nowhere.png"], 2, "nowhere.png"),
        (["generate", "a ring", "-o", "/proc/nowhere/a.png"], 2, "/proc/nowhere"),
        (["generate", "a ring", "-o", "{prompt}.png"], 2, "{index}"),
        (["generate", "a ring", "-n", "20000000"], 2, "at most 10,000 images"),
        (["generate", "a ring", "-n", "1000"], 2, "at most 64 images"),
        (["generate"], 2, "PROMPT"),
        (["cancel", "nobody"], 1, "no job 'nobody'"),
        (["status", "--address", "127.0.0.1:1"], 3, "no StreamFlow gateway answers"),
        (["up", "--model", "/nowhere"], 2, "/nowhere"),
        (["up", "--model", "/etc"], 2, "model: got '/etc'"),
        (["up", "--model", SHAPES, "--model", SHAPES], 2, "more_models: got 'shapes'; allowed: a name other than"),
        (["up", "--model", SHAPES, "--model", "v1.5=" + SHAPES], 2, "more_models: got 'v1.5'"),
        (["up", *3 * ["--model", "a=" + SHAPES]], 2, "more_models: got 'a=/"),
        (["up", "--model", "a=" + SHAPES, "--model", "/nowhere"], 2, "model: got '/nowhere'"),
        (["up", "--port", "0", "--redis-url", "foo"], 2, "redis_url: got 'foo'"),
        (["up", "--port", "0", "--data-dir", "file"], 2, "data_dir: got 'file'"),
        (["up", "--host", "300.1.1.1"], 2, "host: got '300.1.1.1'"),
        (["status", "--timeout", "1"], 2, "No such option"),
        (["generate", "a ring", "--address", "127.0.0.1:1", "--timeout", "0.5"], 3, "no StreamFlow gateway answer"),
        (["generate", "a ring", "--sampler", "euler:shift=2"], 2, "euler[option=value]"),
        (["generate", "a ring", "-o", "-"], 2, "got '-'"),
        (["jobs", "--limit", "0"], 2, "--limit"),
        (["models", "--tls-ca", "/nowhere.pem"], 2, "/nowhere.pem"),
        (["models", "--tls-ca", "/etc/hostname"], 2, "in PEM form"),
        (["status", "--address", "127.0.0.1:99999"], 2, "ports are 1 to 65535"),
        (["status", "--address", "https://127.0.0.1:50051"], 2, "without a scheme"),
        (["status", "--address", "gateway"], 2, "with its port: gateway:50051"),
        (["status", "--api-key", "one\ntwo"], 2, "printable ASCII"),
        (["generate", "a ring", "--steps", "-3"], 2, "--steps"),
        (["generate", "a ring", "--quality", "0"], 2, "--quality"),
        (["generate", "a ring", "--timeout", "inf"], 2, "timeout_s: got inf"),
        (["generate", "a ring", "-o", "{index:>9999999999}.png"], 2, "such as {index:03}"),
        (["generate", "a ring", "-o", "x" * 300 + ".png"], 2, "name too long"),
        (["generate", "a ring", "-o", "file/a.png"], 2, "file/a.png"),
    ],
)
def test_errors_are_one_line(deployment: Deployment, arguments: list[str], code: int, says: str) -> None:
    Path("file").touch()
    result = run(*arguments)
    assert result.exit_code == code
    last = result.stderr.strip().splitlines()[-1]
    assert says in last
    if last.startswith("streamflow: "):
        assert [line for line in result.stderr.splitlines() if not line.startswith("starting;")] == [last]
    assert "Traceback" not in result.output
    assert [path.name for path in Path().iterdir()] == ["file"], "a refused request leaves nothing behind"


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--model", "/nowhere"], {}, "streamflow: model: got '/nowhere'"),
        ([], {"STREAMFLOW_LEASE_S": "soon"}, "streamflow up: lease_s: got 'soon'"),
        ([], {"STREAMFLOW_MAX_JOBS": "0", "STREAMFLOW_THREADS": "x"}, "streamflow up: max_jobs: got '0'"),
        (["--gpus", "0,1"], {"CUDA_VISIBLE_DEVICES": ""}, "streamflow: gpus: got '0'; allowed: nothing, as no GPU"),
        # What it does not use is not looked at.
        (["--model", "/nowhere"], {"STREAMFLOW_PORT": "tcp://10.0.0.1:50051"}, "streamflow: model: got '/nowhere'"),
        (["--model", "/nowhere", "--threads", "2"], {"STREAMFLOW_THREADS": "x"}, "streamflow: model: got '/nowhere'"),
    ],
)
def test_the_program_exits_likewise(arguments: list[str], environment: dict[str, str], says: str) -> None:
    command = [sys.executable, "-m", "streamflow.cli", "up", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert answer.returncode == 2
    assert answer.stderr.startswith(says)
    assert answer.stderr.count("\n") == max(1, answer.stderr.count("streamflow up:"))


def test_status_models_and_jobs(deployment: Deployment) -> None:
    for command, word in (("status", "denoiser-a"), ("models", "euler")):
        assert word in run(command).output
    (stage,) = json.loads(run("status", "--json").output)["stages"]
    assert (stage["slots_in_use"], stage["slots"]) == (3, 8)
    assert json.loads(run("models", "--json").output)[0]["name"] == "shapes"
    assert run("generate", "a ring", "--seed", "9").exit_code == 0
    (job,) = json.loads(run("jobs", "--json").output)
    assert (job["state"], job["seed"], job["num_finished"]) == ("images", 9, 1)
    assert "images" in run("jobs").output


def test_the_ids_of_jobs_stay_whole_on_a_narrow_terminal(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("generate", "a ring").exit_code == 0
    monkeypatch.setenv("COLUMNS", "80")
    assert _jobs(deployment)[0] in run("jobs").output


def test_status_names_the_stages_that_are_missing(deployment: Deployment) -> None:
    lines = run("status").output.splitlines()
    missing = [line for line in lines if "none" in line]
    assert [line.split()[1] for line in missing] == ["encoder", "decoder"]


def test_cancel_ends_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address) as client:
        client.submit("a ring", request_id="mine")
        result = run("cancel", "mine", "--address", deployment.address)
        assert result.output == "mine: cancelled\n"
        assert deployment.state("mine") is JobState.CANCELLED


# Whoever runs the tests in the background has SIGINT ignored, which children inherit.
WITH_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("streamflow.cli", run_name="__main__")
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_the_job_and_leaves_no_traceback(ending: signal.Signals) -> None:
    with Deployment(permits=0) as deployment:
        command = [sys.executable, "-c", WITH_CTRL_C, "generate", "a ring", "--address", deployment.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            deployment.wait_for_watcher()
            process.send_signal(ending)
            _, errors = process.communicate(timeout=30)
        assert process.returncode != 0
        assert "Traceback" not in errors
        (request_id,) = _jobs(deployment)
        assert deployment.state(request_id) is JobState.CANCELLED


def _jobs(deployment: Deployment) -> list[str]:
    with Client(deployment.address) as client:
        return [job.request_id for job in client.jobs()]


@pytest.mark.timeout(300)
def test_engine_exports_what_is_asked_for_and_lists_what_is_there(
    sd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    where = ["--model", str(sd_checkpoint), "--engines", str(tmp_path)]
    listed = run("engine", "list", *where)
    assert listed.output.count("no graph in") == 6
    made = run("engine", "export", *where, "--part", "tiny_decoder")
    assert made.exit_code == 0, made.output
    assert made.output.count("equal bits whatever the neighbours") == 2
    [costs] = tmp_path.glob("*/costs.json")
    assert "tiny_decoder on" in costs.read_text(), "which runtime is faster was measured"
    assert run("engine", "list", *where).output.count("no graph in") == 5
    refused = run("engine", "export", *where, "--part", "tiny")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("streamflow: part: got 'tiny'; allowed: text_encoder, vae_encoder, unet")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu"], "device: got 'cpu'; allowed: a GPU"),
        (["--device", "gpu"], "device: got 'gpu'"),
        (["--device", "cpu", "--dtype", "float8"], "device"),
    ],
)
def test_engines_are_not_built_without_a_gpu(sd_checkpoint: Path, arguments: list[str], says: str) -> None:
    refused = run("engine", "build", "--model", str(sd_checkpoint), *arguments)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"streamflow: {says}")


@pytest.mark.parametrize("size", ["512", "512x", "0x64", "64x63", "x", "64 x 64", "100000x64"])
def test_a_size_that_cannot_be_built_is_refused(sd_checkpoint: Path, size: str) -> None:
    from streamflow.cli.engine import read_size
    from streamflow.errors import InvalidRequestError
    from streamflow.families import describe

    card = describe(sd_checkpoint)
    assert read_size("64x32", card) == (32, 64)
    with pytest.raises(InvalidRequestError, match=r"size|width|height"):
        read_size(size, card)


@pytest.mark.parametrize("arguments", [["up"], ["up", "--model", "/nowhere"], ["models", SHAPES], ["engine", "list"]])
def test_what_needs_more_than_the_command_line_says_so(arguments: list[str]) -> None:
    """As where `pip install '.[cli]'` is all that was done."""
    code = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "redis", "diffusers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from streamflow.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert re.fullmatch(
        r"streamflow: it needs .* (torch|redis|diffusers) is missing; .*: pip install '.\[serve\]'", line
    )
