"""Which backend is taken, and that it serves: the same latents from every one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from streamflow import families
from streamflow.backends import select
from streamflow.backends.graphs import GraphStore
from streamflow.backends.parts import Part, Runner
from streamflow.backends.select import Opener, leave_cores, open_parts
from streamflow.errors import GenerationError, InvalidRequestError, NotFoundError
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.encoder import EncoderStage
from streamflow.types import DecoderKind, DenoiseJob, EncodeJob
from tests.checkpoints import TOKENS

# The first of them exports every network of the checkpoint.
pytestmark = pytest.mark.timeout(300)

ON_CPU = partial(Opener, device=torch.device("cpu"), dtype=torch.float32, threads=1)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_what_is_asked_for_is_taken_or_refused(parts: dict[str, Part], store: GraphStore, name: str) -> None:
    assert ON_CPU(name, store=store)(parts["unet"]).name == name
    with pytest.raises(NotFoundError, match="streamflow engine export"):
        ON_CPU(name, store=GraphStore(Path("/nowhere")))(parts["unet"])
    with pytest.raises(NotFoundError, match="no folder for graphs"):
        ON_CPU(name)(parts["unet"])


def test_auto_takes_what_measured_fastest_and_says_why(
    parts: dict[str, Part], store: GraphStore, caplog: pytest.LogCaptureFixture
) -> None:
    part = parts["unet"]
    with caplog.at_level(logging.INFO):
        taken = ON_CPU("auto", store=store)(part).name
    [said] = [vars(record)["streamflow_fields"] for record in caplog.records if record.message == "fastest backend"]
    assert taken == min(("onnxruntime", "openvino"), key=lambda name: float(said[name].removesuffix(" ms")))
    # Once on a machine, and what it says decides.
    [costs] = (store.folder / part.revision).glob("costs.json")
    [key] = [key for key in json.loads(costs.read_text()) if key.startswith("unet on onnxruntime ")]
    for seconds, name in (([0.1, 0.2], "onnxruntime"), ([0.2, 0.1], "openvino")):
        costs.write_text(json.dumps({key: seconds}))
        assert ON_CPU("auto", store=store)(part).name == name
    costs.unlink()


def test_auto_takes_what_is_there_and_says_why_not_another(
    parts: dict[str, Part], store: GraphStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = select.find_spec
    monkeypatch.setattr(select, "find_spec", lambda name: None if name == "openvino" else real(name))
    assert ON_CPU("auto", store=store)(parts["unet"]).name == "onnxruntime"
    with caplog.at_level(logging.INFO):
        assert ON_CPU("auto", store=GraphStore(Path("/nowhere")))(parts["unet"]).name == "torch-eager"
    assert "no graph in /nowhere" in str(vars(caplog.records[-1]))


@pytest.mark.parametrize(("backends", "threads"), [("openvino, onnxruntime", 1), ("torch-eager, onnxruntime", 2)])
def test_torch_leaves_the_cores_to_a_runtime_that_does_all_the_work(backends: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    leave_cores(backends)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"backend": "tensorflow"}, "backend: got 'tensorflow'"),
        ({"backend": "onnxruntime", "dtype": "float64"}, "dtype: got 'float64'"),
    ],
)
def test_what_there_is_not_is_refused(arguments: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        open_parts("cpu", **arguments)


def test_a_precision_that_a_backend_lacks_is_refused(parts: dict[str, Part], store: GraphStore) -> None:
    opener = Opener("onnxruntime", torch.device("cpu"), torch.bfloat16, store)
    with pytest.raises(InvalidRequestError, match="openvino takes bfloat16"):
        opener(parts["unet"])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
async def test_the_stages_give_what_they_give_on_torch(sd_checkpoint: Path, store: GraphStore, backend: str) -> None:
    def stages(backend: str) -> tuple[EncoderStage, DenoiserStage, DecoderStage]:
        where = {"device": "cpu", "backend": backend, "engines": store.folder, "threads": 1}
        return tuple(kind.load(sd_checkpoint, **where) for kind in (EncoderStage, DenoiserStage, DecoderStage))  # type: ignore[attr-defined, return-value]

    rng = np.random.default_rng(0)
    texts = {role: {"prompt_embeds": rng.normal(size=(TOKENS, 16)).astype(np.float32)} for role in Role}
    asked = [("euler", 2 + k, Guidance((1.0, 4.0)[k % 2])) for k in range(4)] + [("H1P1R1", 3, Guidance(2.0))]
    jobs = [DenoiseJob(texts, steps, guidance, sampler, 7, 64, 64) for sampler, steps, guidance in asked]
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    found = {}
    for name in ("torch", backend):
        encoder, denoiser, decoder = stages(name)
        assert {encoder.backend, denoiser.backend, decoder.backend} == {"torch-eager" if name == "torch" else name}
        [encoded] = encoder.encode([EncodeJob({Role.TARGET: "a red circle"}, init_image=image)])
        latents = np.stack(denoiser.run(jobs))
        found[name] = (
            encoded.conditioning[Role.TARGET]["prompt_embeds"],
            latents,
            decoder.decode(latents, DecoderKind.FULL),
        )
    for ours, theirs in zip(found[backend][:2], found["torch"][:2], strict=True):
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert np.abs(found[backend][2].astype(int) - found["torch"][2]).max() <= 1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_deterministic_pads_only_where_bits_would_change(sd_checkpoint: Path, store: GraphStore, backend: str) -> None:
    stage = DenoiserStage.load(
        sd_checkpoint, device="cpu", backend=backend, engines=store.folder, threads=1, deterministic=True, slots=8
    )
    assert stage.row_counts == ((8,) if backend == "torch" else ())
    rng = np.random.default_rng(0)
    texts = {role: {"prompt_embeds": rng.normal(size=(TOKENS, 16)).astype(np.float32)} for role in Role}
    jobs = [DenoiseJob(texts, 2 + seed, Guidance((1.0, 4.0)[seed % 2]), "euler", seed, 64, 64) for seed in range(5)]
    for job, together in zip(jobs, stage.run(jobs), strict=True):
        [alone] = stage.run([job])
        assert np.array_equal(alone, together)


def test_deterministic_takes_the_same_runtime_everywhere(
    parts: dict[str, Part], store: GraphStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "measure", lambda *_, **__: pytest.fail("a timing must not decide"))
    assert ON_CPU("auto", store=store, measured=False)(parts["unet"]).name == "onnxruntime"


def test_what_a_runtime_raises_is_told_and_another_one_is_taken(
    parts: dict[str, Part], store: GraphStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: object, inputs: object) -> None:
        raise OSError("libsomething.so is missing")

    monkeypatch.setattr(select.OnnxRuntimeRunner, "__call__", broken)
    with caplog.at_level(logging.INFO):
        assert ON_CPU("auto", store=store)(parts["tiny_decoder"]).name == "openvino"
    assert "libsomething.so is missing" in str([vars(record) for record in caplog.records])
    with pytest.raises(GenerationError, match=r"tiny_decoder: onnxruntime failed: OSError: libsomething\.so"):
        ON_CPU("onnxruntime", store=store)(parts["tiny_decoder"])


def test_rows_that_are_shared_out_are_tested_together(parts: dict[str, Part], store: GraphStore) -> None:
    class WrongInTheMiddle:
        name, row_invariant, row_counts = "wrong", True, None

        def __init__(self, runner: Runner) -> None:
            self._runner = runner

        def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            output = self._runner(inputs)
            if len(output) > 3:
                output[4] += 1e-3
            return output

    runner = WrongInTheMiddle(ON_CPU("onnxruntime", store=store)(parts["unet"]))
    assert store.test(parts["unet"], runner).row_invariant
    tested = store.test(parts["unet"], runner, cores=2)
    assert not tested.row_invariant
    assert tested.error > 1e-4


def test_steps_are_compiled_by_torch_alone(sd_checkpoint: Path) -> None:
    with pytest.raises(InvalidRequestError, match="got 'onnxruntime'; allowed: auto or torch"):
        DenoiserStage.load(sd_checkpoint, device="cpu", backend="onnxruntime", compiled=True)


def test_the_number_of_slots_follows_from_what_a_call_costs(sd_checkpoint: Path, tmp_path: Path) -> None:
    stage = DenoiserStage.load(sd_checkpoint, device="cpu", engines=tmp_path, slots=0)
    assert stage.cost is not None
    assert stage.slots == stage.cost.slots(least=4, most=64)
    again = DenoiserStage.load(sd_checkpoint, device="cpu", engines=tmp_path, slots=0)
    assert again.cost == stage.cost, "it is measured once on a machine"


def test_what_is_missing_is_made_where_that_was_asked_for(sd_checkpoint: Path, tmp_path: Path) -> None:
    [part] = [part for part in families.parts(sd_checkpoint) if part.name == "tiny_decoder"]
    opener = open_parts("cpu", backend="onnxruntime", engines=tmp_path, make_engines=True)
    assert opener(part).name == "onnxruntime"
    assert open_parts("cpu", backend="onnxruntime", engines=tmp_path)(part).name == "onnxruntime"
