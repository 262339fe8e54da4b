"""The networks of every family as graphs: ONNX Runtime and OpenVINO against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from streamflow import families
from streamflow.backends.graphs import GraphStore
from streamflow.backends.onnx_runtime import OnnxRuntimeRunner
from streamflow.backends.open_vino import OpenVinoRunner
from streamflow.backends.torch_eager import TorchRunner
from streamflow.families.checkpoint import Checkpoint
from tests.checkpoints.sd import save_sdxl_checkpoint
from tests.checkpoints.transformers import save_flux_checkpoint, save_sd3_checkpoint, save_sit_checkpoint

FLOAT = partial(TorchRunner, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("save", "flow"),
    [
        (save_sdxl_checkpoint, "perflow"),
        (save_sd3_checkpoint, "auto"),
        (save_flux_checkpoint, "auto"),
        (partial(save_flux_checkpoint, distilled_guidance=False), "auto"),
        (save_sit_checkpoint, "auto"),
    ],
)
def test_every_network_equals_torch_for_other_rows_and_sizes(
    tmp_path: Path, save: Callable[[Path], Path], flow: str
) -> None:
    """Exported from two rows of the default size, with a timestep of its own in every row."""
    store = GraphStore(tmp_path / "engines")
    for part in families.parts(Checkpoint(save(tmp_path / "checkpoint"), flow=flow)):
        path, reference = store.make(part), FLOAT(part)
        # The positions of SiT's tokens are those of one size.
        wide = {} if save is save_sit_checkpoint or not part.sizes else {"width": part.sizes["width"] * 3 // 2}
        for runner in (OnnxRuntimeRunner(path, threads=2), OpenVinoRunner(path, threads=2)):
            for rows, sizes in ((1, {}), (3, wide), (5, {})):
                inputs = part.example(rows, seed=rows, **sizes)
                expected, found = reference(inputs), runner(inputs)
                assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (part.name, runner.name, rows)
