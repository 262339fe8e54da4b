"""Graphs of a small checkpoint, exported once."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamflow import families
from streamflow.backends.graphs import GraphStore
from streamflow.backends.parts import Part


@pytest.fixture(scope="session")
def parts(sd_checkpoint: Path) -> dict[str, Part]:
    return {part.name: part for part in families.parts(sd_checkpoint)}


@pytest.fixture(scope="session")
def store(parts: dict[str, Part], tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """With the graph of every part."""
    store = GraphStore(tmp_path_factory.mktemp("engines"))
    for part in parts.values():
        store.make(part)
    return store
