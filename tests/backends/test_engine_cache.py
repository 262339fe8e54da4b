"""TensorRT engines on disk: which is used, and which is not and why. Building itself needs a GPU, and is left out."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamflow import families
from streamflow.backends.engine_cache import Built, EngineCache, Options, Platform, Profiles, Shapes, engines_of
from streamflow.backends.graphs import GraphStore
from streamflow.backends.parts import Part
from streamflow.errors import NotFoundError

pytestmark = pytest.mark.timeout(300)

H100 = Platform("11.4.0", "9.0")
SMALL = Profiles((1, 2, 4), ((64, 64),))
LARGE = Profiles((1, 4, 16), ((64, 64), (64, 128)))
WANTED = Profiles((4,), ((64, 64),))


def build(graph: Path, engine: Path, shapes: list[Shapes], timing_cache: Path, options: Options) -> None:
    """What a builder leaves behind, told by its inputs."""
    assert graph.is_file()
    engine.write_text(json.dumps([dict(one) for one in shapes]))
    timing_cache.touch()


@pytest.fixture
def part(parts: dict[str, Part]) -> Part:
    return parts["tiny_decoder"]


@pytest.fixture
def graphs(store: GraphStore, part: Part, tmp_path: Path) -> GraphStore:
    """With the smallest part alone."""
    folder = tmp_path / "engines" / part.revision
    folder.mkdir(parents=True)
    for file in store.path(part).parent.glob("tiny_decoder.*"):
        shutil.copy(file, folder)
    return GraphStore(tmp_path / "engines")


@pytest.fixture
def cache(graphs: GraphStore) -> EngineCache:
    return EngineCache(graphs, H100, dtype=torch.float32)


def test_an_engine_has_a_profile_for_every_number_of_rows_in_every_size(cache: EngineCache, part: Part) -> None:
    built = cache.make(part, LARGE, build)
    shapes = [tuple(one["latents"]) for one in json.loads(built.path.read_text())]
    assert shapes == [(rows, 4, 16, width) for width in (16, 32) for rows in (1, 4, 16)]


def test_a_text_encoder_has_no_sizes(parts: dict[str, Part]) -> None:
    part = parts["text_encoder"]
    assert [one["input_ids"][0] for one in LARGE.shapes(part)] == [1, 4, 16]
    assert SMALL.covers(Profiles((2,), ((512, 512),)), part)


def test_engines_are_listed_whatever_they_are_for(cache: EngineCache, graphs: GraphStore, part: Part) -> None:
    built = cache.make(part, LARGE, build)
    (built.path.parent / "broken.json").write_text('{"made_of": {"part": "tiny_decoder", "rows": 3}}')
    for_what = "float32, TensorRT 11.4.0, cards of 9.0"
    assert engines_of(graphs, part) == [(part.name, built.path.stem, for_what, "1, 4, 16", "64 x 64, 128 x 64")]


@pytest.mark.parametrize("sizes", [[[64]], [], "x", 3])
def test_a_manifest_that_makes_no_sense_is_a_reason(cache: EngineCache, part: Part, sizes: object) -> None:
    manifest = cache.make(part, SMALL, build).path.with_suffix(".json")
    said = json.loads(manifest.read_text())
    said["made_of"] |= {"sizes": sizes} if sizes else {"rows": []}
    manifest.write_text(json.dumps(said))
    with pytest.raises(NotFoundError, match="no engine that fits"):
        cache.find(part, WANTED)


def test_the_smallest_engine_that_fits_is_taken(cache: EngineCache, part: Part) -> None:
    large = cache.make(part, LARGE, build)
    assert cache.find(part, WANTED) == large
    small = cache.make(part, SMALL, build)
    assert cache.find(part, WANTED) == small
    assert cache.find(part, Profiles((8,), ((64, 128),))) == large


@pytest.mark.parametrize("wanted", [Profiles((8,), ((64, 64),)), Profiles((4,), ((96, 64),))])
def test_one_that_takes_too_little_is_refused_with_the_command_that_builds_more(
    cache: EngineCache, part: Part, wanted: Profiles
) -> None:
    cache.make(part, SMALL, build)
    with pytest.raises(NotFoundError, match="takes up to 4 rows, and pictures of 64 x 64") as refused:
        cache.find(part, wanted)
    [(height, width)] = wanted.sizes
    command = f"streamflow engine build --dtype float32 --rows {wanted.rows[-1]} --size {width}x{height}"
    assert command in str(refused.value)


def other_weights(graphs: GraphStore, part: Part, built: Built) -> tuple[EngineCache, Part]:
    other = replace(part, revision="other")
    graphs.make(other)
    return EngineCache(graphs, H100, dtype=torch.float32), other


def another_graph(graphs: GraphStore, part: Part, built: Built) -> tuple[EngineCache, Part]:
    path = graphs.path(part)
    path.with_suffix(".json").unlink()
    content = path.read_bytes()
    graphs.make(part)
    # The exporter writes the same bytes again; another version of it may not.
    path.write_bytes(content + b"\x00")
    manifest = path.with_suffix(".json")
    said = json.loads(manifest.read_text())
    said["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(said))
    return EngineCache(graphs, H100, dtype=torch.float32), part


def an_adapter(graphs: GraphStore, part: Part, built: Built) -> tuple[EngineCache, Part]:
    return EngineCache(graphs, H100, dtype=torch.float32, adapters=("d1ge57",)), part


def another_version(graphs: GraphStore, part: Part, built: Built) -> tuple[EngineCache, Part]:
    return EngineCache(graphs, replace(H100, tensorrt="11.5.0"), dtype=torch.float32), part


def another_card(graphs: GraphStore, part: Part, built: Built) -> tuple[EngineCache, Part]:
    return EngineCache(graphs, replace(H100, compute_capability="8.9"), dtype=torch.float32), part


def cut(graphs: GraphStore, part: Part, built: Built) -> tuple[EngineCache, Part]:
    built.path.write_bytes(built.path.read_bytes()[:-1])
    return EngineCache(graphs, H100, dtype=torch.float32), part


def gone(graphs: GraphStore, part: Part, built: Built) -> tuple[EngineCache, Part]:
    built.path.unlink()
    return EngineCache(graphs, H100, dtype=torch.float32), part


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_weights, "none is in"),
        (another_graph, "made for graph"),
        (an_adapter, r"made for adapters \[\], not \['d1ge57'\]"),
        (another_version, "made for tensorrt '11.4.0', not '11.5.0'"),
        (another_card, "made for compute_capability '9.0', not '8.9'"),
        (cut, "is not what was written"),
        (gone, "is missing"),
    ],
)
def test_an_engine_that_does_not_fit_is_not_used_and_built_anew(
    graphs: GraphStore,
    cache: EngineCache,
    part: Part,
    change: Callable[[GraphStore, Part, Built], tuple[EngineCache, Part]],
    says: str,
) -> None:
    changed, asked = change(graphs, part, cache.make(part, SMALL, build))
    with pytest.raises(NotFoundError, match=says) as refused:
        changed.find(asked, WANTED)
    assert "streamflow engine build" in str(refused.value)
    assert changed.make(asked, SMALL, build) == changed.find(asked, WANTED)


@pytest.mark.parametrize(
    ("version", "fits"), [("11.4.0", True), ("11.10.0", True), ("11.3.9", False), ("12.0.0", False), ("10.16.1", False)]
)
def test_a_version_compatible_engine_serves_later_versions_of_the_same_major(
    graphs: GraphStore, cache: EngineCache, part: Part, version: str, fits: bool
) -> None:
    built = cache.make(part, SMALL, build, Options(version_compatible=True))
    other = EngineCache(graphs, replace(H100, tensorrt=version), dtype=torch.float32)
    if fits:
        assert other.find(part, WANTED) == built
    else:
        with pytest.raises(NotFoundError, match=f"made for tensorrt '11.4.0', not '{version}'"):
            other.find(part, WANTED)


def test_other_options_are_another_engine_and_the_plain_one_is_preferred(cache: EngineCache, part: Part) -> None:
    made = [cache.make(part, SMALL, build, Options(*flags)) for flags in ((True, True), (True, False), (False, False))]
    assert len({built.path for built in made}) == 3
    assert cache.find(part, WANTED) == made[-1]


def test_half_precision_is_another_engine(cache: EngineCache, graphs: GraphStore, part: Part) -> None:
    cache.make(part, SMALL, build)
    half = EngineCache(graphs, H100, dtype=torch.float16)
    with pytest.raises(NotFoundError, match=r"tiny_decoder\.float16: no graph .*`streamflow engine build`"):
        half.find(part, WANTED)


def test_a_build_that_fails_leaves_nothing_that_is_used(cache: EngineCache, part: Part) -> None:
    def fails(graph: Path, engine: Path, shapes: list[Shapes], timing_cache: Path, options: Options) -> None:
        engine.write_text("half of it")
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        cache.make(part, SMALL, fails)
    with pytest.raises(NotFoundError, match="none is in"):
        cache.find(part, WANTED)


def _slowly(graph: Path, engine: Path, shapes: list[Shapes], timing_cache: Path, options: Options) -> None:
    # So long that the other process asks for the engine while it is built.
    time.sleep(1)
    (graph.parent / f"built-{os.getpid()}").touch()
    build(graph, engine, shapes, timing_cache, options)


def _make(checkpoint: Path, folder: Path) -> None:
    [part] = [part for part in families.parts(checkpoint) if part.name == "tiny_decoder"]
    cache = EngineCache(GraphStore(folder), H100, dtype=torch.float32)
    assert cache.make(part, SMALL, _slowly) == cache.find(part, WANTED)


def test_of_two_processes_one_builds(sd_checkpoint: Path, graphs: GraphStore) -> None:
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=_make, args=(sd_checkpoint, graphs.folder)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(100)
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert len(list(graphs.folder.glob("*/built-*"))) == 1
