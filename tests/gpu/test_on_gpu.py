"""What only a GPU can show: steps as CUDA graphs, half precision, no waiting in the tick, TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from streamflow import families
from streamflow.backends.graphs import GraphStore
from streamflow.backends.parts import Part
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.encoder import EncoderStage
from streamflow.types import DecoderKind, DenoiseJob, EncodeJob
from tests.checkpoints import TOKENS, save_sd_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ASKED = (
    ("euler", 4, 1.0),
    ("euler", 7, 4.0),
    ("heun", 3, 2.0),
    ("H1P2R1", 4, 1.0),
    ("euler-sde", 5, 3.0),
    ("pseudo", 6, 1.0),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd_checkpoint(tmp_path_factory.mktemp("gpu") / "sd")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 is float32: TF32 would hide mistakes of its own size."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def jobs(size: int = 64) -> list[DenoiseJob]:
    rng = np.random.default_rng(0)
    texts = {role: {"prompt_embeds": rng.normal(size=(TOKENS, 16)).astype(np.float32)} for role in Role}
    return [
        DenoiseJob(texts, steps, Guidance(scale), sampler, seed, size, size)
        for seed, (sampler, steps, scale) in enumerate(ASKED)
    ]


def off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Path) -> np.ndarray:
    return np.stack(DenoiserStage.load(checkpoint, device="cpu", slots=4).run(jobs()))


@pytest.mark.parametrize("compiled", [False, True], ids=["graphs", "compiled"])
def test_a_mixed_batch_gives_what_the_cpu_gives(checkpoint: Path, on_cpu: np.ndarray, compiled: bool) -> None:
    stage = DenoiserStage.load(checkpoint, device="cuda", dtype="float32", slots=4, compiled=compiled)
    assert stage.backend == ("torch-compiled" if compiled else "torch-eager")
    assert off(np.stack(stage.run(jobs())), on_cpu) < 1e-3
    # Once more: the graphs are there now, and hold what others left in them.
    assert off(np.stack(stage.run(jobs())), on_cpu) < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near(checkpoint: Path, on_cpu: np.ndarray, dtype: str) -> None:
    stage = DenoiserStage.load(checkpoint, device="cuda", dtype=dtype, slots=4, compiled=False)
    assert off(np.stack(stage.run(jobs())), on_cpu) < 0.1


def test_the_other_stages_give_what_the_cpu_gives(checkpoint: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    found = {}
    for device in ("cpu", "cuda"):
        where = {"device": device, "dtype": "float32"}
        [encoded] = EncoderStage.load(checkpoint, **where).encode(  # type: ignore[arg-type]
            [EncodeJob({Role.TARGET: "a red circle"}, init_image=image)]
        )
        assert encoded.init_latents is not None
        pixels = DecoderStage.load(checkpoint, **where).decode(encoded.init_latents[None], DecoderKind.FULL)  # type: ignore[arg-type]
        found[device] = encoded.conditioning[Role.TARGET]["prompt_embeds"], encoded.init_latents, pixels
    assert off(found["cuda"][0], found["cpu"][0]) < 1e-3
    assert off(found["cuda"][1], found["cpu"][1]) < 1e-3
    assert np.abs(found["cuda"][2].astype(int) - found["cpu"][2]).max() <= 1


def test_a_tick_waits_for_nothing_but_what_leaves(checkpoint: Path) -> None:
    stage = DenoiserStage.load(checkpoint, device="cuda", slots=4, compiled=False)
    stage.run(jobs())
    engine = stage.engine
    for handle, job in enumerate(jobs()[:3]):
        engine.admit(stage.image(job, handle=handle))
    engine.tick()
    torch.cuda.set_sync_debug_mode("error")
    try:
        report = engine.tick()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not report.retired
    engine.clear()


# -- TensorRT --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an engine of every network, in float32."""
    pytest.importorskip("tensorrt")
    pytest.importorskip("polygraphy")
    from streamflow.backends.engine_cache import EngineCache, Profiles
    from streamflow.backends.tensorrt_build import build
    from streamflow.backends.tensorrt_runtime import platform

    folder = tmp_path_factory.mktemp("engines")
    cache = EngineCache(GraphStore(folder), platform(torch.device("cuda")), dtype=torch.float32)
    for part in families.parts(checkpoint):
        cache.make(part, Profiles((1, 4, 8), ((64, 64), (64, 96))), partial(build, refittable=False))
    return folder


def test_tensorrt_gives_what_the_cpu_gives(checkpoint: Path, engines: Path, on_cpu: np.ndarray) -> None:
    where = {"device": "cuda", "dtype": "float32", "backend": "tensorrt", "engines": engines}
    stage = DenoiserStage.load(checkpoint, **where, slots=4)  # type: ignore[arg-type]
    assert (stage.backend, stage.row_counts) == ("tensorrt", (1, 4, 8))
    assert off(np.stack(stage.run(jobs())), on_cpu) < 1e-3


def test_tensorrt_pads_and_cuts_rows(checkpoint: Path, engines: Path) -> None:
    from streamflow.backends.select import open_parts

    parts: dict[str, Part] = {part.name: part for part in families.parts(checkpoint)}
    for name, part in parts.items():
        runner = open_parts("cuda", "float32", backend="tensorrt", engines=engines)(part)
        reference = open_parts("cuda", "float32", backend="torch")(part)
        for rows in (1, 3, 8, 19):
            inputs = part.example(rows, seed=rows)
            found, expected = runner(inputs).cpu().numpy(), reference(inputs).cpu().numpy()
            assert off(found, expected) < 1e-3, (name, rows)


def test_tensorrt_refuses_a_size_that_was_not_built(checkpoint: Path, engines: Path) -> None:
    from streamflow.backends.select import open_parts
    from streamflow.errors import InvalidRequestError

    [part] = [part for part in families.parts(checkpoint) if part.name == "tiny_decoder"]
    runner = open_parts("cuda", "float32", backend="tensorrt", engines=engines)(part)
    with pytest.raises(InvalidRequestError, match="streamflow engine build --size"):
        runner(part.example(1, height=8))
