"""Where images are saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamflow import Client
from streamflow.client.result import output_paths


def paths(target: str | Path, count: int) -> list[str]:
    return [str(path) for path in output_paths(target, request_id="r", seeds=range(7, 7 + count), suffix="png")]


def test_names(tmp_path: Path) -> None:
    assert paths("a.png", 1) == ["a.png"]
    assert paths("a.png", 2) == ["a-0.png", "a-1.png"]
    assert paths("out", 2) == ["out/r-0.png", "out/r-1.png"]
    assert paths("v1.0/", 1) == ["v1.0/r-0.png"]
    assert paths(tmp_path, 1) == [str(tmp_path / "r-0.png")]
    assert paths("{seed}/{index:03}.{suffix}", 2) == ["7/000.png", "8/001.png"]


@pytest.mark.parametrize("target", ["{prompt}.png", "{}.png", "{index.png", "same-{request_id}.png"])
def test_patterns_that_cannot_be_used(target: str) -> None:
    with pytest.raises(ValueError, match=r"png"):
        paths(target, 2)


def test_save_writes_the_files_and_makes_folders(client: Client, tmp_path: Path) -> None:
    result = client.generate("a ring", num_images=2)
    saved = result.save(tmp_path / "new" / "ring.png")
    assert saved == [tmp_path / "new" / "ring-0.png", tmp_path / "new" / "ring-1.png"]
    assert tuple(path.read_bytes() for path in saved) == result.files
