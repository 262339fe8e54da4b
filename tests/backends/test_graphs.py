"""Every network of a checkpoint, exported: the runtimes against torch, and graphs that must not be used."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamflow import families
from streamflow.backends.graphs import GraphStore
from streamflow.backends.onnx_runtime import OnnxRuntimeRunner
from streamflow.backends.open_vino import OpenVinoRunner, has_bfloat16
from streamflow.backends.parts import Part, PartModule, Runner
from streamflow.errors import InvalidRequestError, NotFoundError, UnavailableError

# The first of them exports every network of the checkpoint.
pytestmark = pytest.mark.timeout(300)

NAMES = ("text_encoder", "unet", "unet_refiner", "vae_encoder", "tiny_decoder", "vae_decoder")
# Two threads: a call of one row takes both, more rows are shared out.
RUNTIMES: dict[str, Callable[[Path], Runner]] = {
    "onnxruntime": lambda path: OnnxRuntimeRunner(path, threads=2),
    "openvino": lambda path: OpenVinoRunner(path, threads=2),
}
EXPORTED_ROWS = 2


def test_every_network_is_a_part(parts: dict[str, Part]) -> None:
    assert set(parts) == set(NAMES)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_equals_torch_for_other_rows_and_sizes(
    parts: dict[str, Part], store: GraphStore, name: str, runtime: str
) -> None:
    part = parts[name]
    runner, module = (
        RUNTIMES[runtime](store.path(part)),
        PartModule(part, device=torch.device("cpu"), dtype=torch.float32),
    )
    wide = {axis: 2 * size if axis == "width" else size for axis, size in part.sizes.items()}
    for rows, sizes in ((1, {}), (EXPORTED_ROWS + 3, {}), (EXPORTED_ROWS + 1, wide)):
        inputs = part.example(rows, seed=rows, **sizes)
        if "timestep" in inputs:
            assert len(set(inputs["timestep"].tolist())) == rows
        expected, found = module(*inputs.values()), runner(inputs)
        assert found.dtype is torch.float32
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_whatever_is_beside_it(
    parts: dict[str, Part], store: GraphStore, name: str, runtime: str
) -> None:
    part = parts[name]
    runner, inputs = RUNTIMES[runtime](store.path(part)), part.example(16)
    together = runner(inputs)
    for first, count in ((0, 1), (3, 2), (5, 8)):
        some = runner({key: rows[first : first + count] for key, rows in inputs.items()})
        assert torch.equal(some, together[first : first + count])
    assert store.test(part, runner, cores=2).row_invariant


def test_what_a_runner_returns_is_the_callers(parts: dict[str, Part], store: GraphStore) -> None:
    part = parts["unet"]
    for runtime in RUNTIMES.values():
        runner = runtime(store.path(part))
        first = runner(part.example(2, seed=1))
        kept = first.clone()
        runner(part.example(2, seed=2))
        assert torch.equal(first, kept)


def test_bfloat16_is_near_or_refused(parts: dict[str, Part], store: GraphStore) -> None:
    part = parts["unet"]
    if has_bfloat16():
        assert store.test(part, OpenVinoRunner(store.path(part), dtype=torch.bfloat16)).error < 0.1
    else:
        with pytest.raises(InvalidRequestError, match="processor"):
            OpenVinoRunner(store.path(part), dtype=torch.bfloat16)
    with pytest.raises(InvalidRequestError, match="got 'float16'"):
        OpenVinoRunner(store.path(part), dtype=torch.float16)


# -- graphs that must not be used ------------------------------------------------------------------------------------


@pytest.fixture
def own_store(store: GraphStore, parts: dict[str, Part], tmp_path: Path) -> GraphStore:
    """With the smallest part alone, to be damaged."""
    source = store.path(parts["tiny_decoder"]).parent
    folder = tmp_path / "engines" / source.name
    folder.mkdir(parents=True)
    for file in source.glob("tiny_decoder.*"):
        shutil.copy(file, folder)
    return GraphStore(tmp_path / "engines")


def test_a_part_without_a_graph_names_the_command(parts: dict[str, Part], own_store: GraphStore) -> None:
    assert own_store.find(parts["tiny_decoder"]).is_file()
    with pytest.raises(NotFoundError, match=r"unet: no graph in .*`streamflow engine export`"):
        own_store.find(parts["unet"])


def cut(folder: Path) -> None:
    graph = folder / "tiny_decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])


def of_another_revision(folder: Path) -> None:
    _say(folder, revision="another")


def of_other_inputs(folder: Path) -> None:
    _say(folder, inputs={"latents": ["rows", 16, "height", "width"]})


def without_its_test(folder: Path) -> None:
    (folder / "tiny_decoder.test.safetensors").unlink()


def with_a_broken_manifest(folder: Path) -> None:
    (folder / "tiny_decoder.json").write_text("{")


def with_a_manifest_of_another_kind(folder: Path) -> None:
    (folder / "tiny_decoder.json").write_text('["tiny_decoder"]')


def _say(folder: Path, **changes: object) -> None:
    manifest = folder / "tiny_decoder.json"
    said = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**said, "made_of": {**said["made_of"], **changes}}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "tiny_decoder.onnx is not what was written"),
        (of_another_revision, "it was made for revision 'another'"),
        (of_other_inputs, "it was made for inputs"),
        (without_its_test, "tiny_decoder.test.safetensors is missing"),
        (with_a_broken_manifest, "cannot be used"),
        (with_a_manifest_of_another_kind, "cannot be used"),
    ],
)
def test_a_graph_that_is_not_what_it_says_is_refused_and_made_anew(
    parts: dict[str, Part], own_store: GraphStore, damage: Callable[[Path], None], says: str
) -> None:
    part = parts["tiny_decoder"]
    damage(own_store.path(part).parent)
    with pytest.raises(NotFoundError, match=says):
        own_store.find(part)
    assert own_store.make(part) == own_store.find(part)


def test_a_folder_that_cannot_be_written_to_is_named(
    parts: dict[str, Part], own_store: GraphStore, tmp_path: Path
) -> None:
    assert own_store.make(parts["tiny_decoder"]).is_file()
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=r"cannot be written to .*file.* \(STREAMFLOW_ENGINES\)"):
        GraphStore(tmp_path / "file").make(parts["tiny_decoder"])


def test_what_a_killed_process_left_is_cleared(parts: dict[str, Part], own_store: GraphStore) -> None:
    path = own_store.path(parts["tiny_decoder"])
    left = path.parent / "tiny_decoder.made-abc"
    left.mkdir()
    (left / "half.onnx").touch()
    path.unlink()
    own_store.make(parts["tiny_decoder"])
    assert not left.exists()


def test_other_weights_are_another_graph(parts: dict[str, Part], own_store: GraphStore) -> None:
    with pytest.raises(NotFoundError, match="no graph"):
        own_store.find(replace(parts["tiny_decoder"], revision="other"))


def test_what_is_no_graph_is_refused_by_the_runtimes(tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    path.write_bytes(b"\x00" * 1000)
    for runtime in RUNTIMES.values():
        with pytest.raises(InvalidRequestError, match=r"unet\.onnx"):
            runtime(path)


def _make(checkpoint: Path, folder: Path) -> None:
    [part] = [part for part in families.parts(checkpoint) if part.name == "tiny_decoder"]
    path = GraphStore(folder).make(part)
    (folder / f"made-{os.getpid()}").write_text(str(path.stat().st_mtime_ns))


def test_two_processes_make_a_graph_once(sd_checkpoint: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=_make, args=(sd_checkpoint, tmp_path)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(100)
    assert [maker.exitcode for maker in makers] == [0, 0]
    first, second = (file.read_text() for file in tmp_path.glob("made-*"))
    assert first == second
