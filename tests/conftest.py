"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Graphs in the user's cache would decide what runs the networks, here and in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        if "STREAMFLOW_ENGINES" not in os.environ:
            patch.setenv("STREAMFLOW_ENGINES", str(tmp_path_factory.mktemp("engines")))
        yield


@pytest.fixture(scope="session")
def shapes() -> Path:
    """The built-in model."""
    return REPOSITORY / "models" / "shapes"


@pytest.fixture(scope="session")
def sd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion checkpoint with random weights."""
    import torch

    from tests.checkpoints import save_sd_checkpoint

    # Several threads on a busy machine cost more than they bring for networks this small.
    torch.set_num_threads(1)
    return save_sd_checkpoint(tmp_path_factory.mktemp("checkpoints") / "sd")
