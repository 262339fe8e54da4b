"""What a stage loads is what was planned, and nothing else of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamflow.errors import InvalidRequestError
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.plan import plan
from streamflow.types import Stage
from tests.checkpoints.sd import save_sdxl_checkpoint
from tests.checkpoints.transformers import save_flux_checkpoint, save_sd3_checkpoint, save_sit_checkpoint

LOAD = """
import gc, json, sys
import torch
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.encoder import EncoderStage

def held():
    gc.collect()
    modules = [one for one in gc.get_objects() if isinstance(one, torch.nn.Module)]
    weights = {id(one): one for module in modules for one in module.state_dict(keep_vars=True).values()}
    total = sum(one.numel() * one.element_size() for one in weights.values())
    return {"classes": sorted({type(one).__name__ for one in modules}), "bytes": total}

told = {}
kinds = {"decode": (DecoderStage, {}), "denoise": (DenoiserStage, {"slots": 2}), "encode": (EncoderStage, {})}
for name, (kind, more) in kinds.items():
    stage = kind.load(sys.argv[1], device="cpu", backend="torch", **more)
    told[name] = held()
    stage.close() if hasattr(stage, "close") else None
    del stage
print(json.dumps(told))
"""


def test_each_stage_of_sd3_holds_its_own_networks_and_what_was_planned(tmp_path: Path) -> None:
    """In a process that has loaded nothing else, one stage after the other."""
    folder = save_sd3_checkpoint(tmp_path / "sd3")
    planned = plan(folder, torch.float32)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    own = {
        Stage.ENCODE: {"CLIPTextModelWithProjection", "T5EncoderModel", "AutoencoderKL"},
        Stage.DENOISE: {"SD3Transformer2DModel"},
        Stage.DECODE: {"AutoencoderKL", "AutoencoderTiny"},
    }
    for stage, classes in own.items():
        found = set(told[stage.value]["classes"])
        assert found & set().union(*own.values()) == classes
        assert told[stage.value]["bytes"] == planned.memory_bytes(stage, slots=0) > 0
        # The half of an autoencoder that the stage has no use for is gone too.
        assert ("Decoder" in found, "Encoder" in found) == (stage is Stage.DECODE, stage is Stage.ENCODE)


@pytest.mark.parametrize("save", [save_sdxl_checkpoint, save_flux_checkpoint, save_sit_checkpoint])
def test_every_family_is_planned(tmp_path: Path, save: object) -> None:
    folder = save(tmp_path / "checkpoint")  # type: ignore[operator]
    checkpoint = Checkpoint(folder, flow="perflow" if save is save_sdxl_checkpoint else "auto")
    whole, half = plan(checkpoint, torch.float32), plan(checkpoint, torch.float16)
    for stage in Stage:
        # The autoencoder of SDXL overflows in half precision.
        some = 0 if stage is Stage.DECODE and save is save_sdxl_checkpoint else 1
        assert whole.memory_bytes(stage, slots=0) >= half.memory_bytes(stage, slots=0) + some > 0
    assert (
        whole.memory_bytes(Stage.DENOISE, slots=3) - whole.memory_bytes(Stage.DENOISE, slots=0) == 3 * whole.slot_bytes
    )


def test_slots_take_what_is_planned(tmp_path: Path) -> None:
    from streamflow.flow.guidance import Guidance
    from streamflow.flow.programs import Role
    from streamflow.stages.denoiser import DenoiserStage
    from streamflow.types import DenoiseJob

    folder = save_flux_checkpoint(tmp_path / "flux")
    stage = DenoiserStage.load(folder, device="cpu", slots=3)
    texts = {role: stage._blank("euler", 1.0).conditioning[role] for role in Role}
    stage.engine.admit(stage.image(DenoiseJob(texts, 2, Guidance(), "euler", 0, 64, 64), handle=0))
    (table,) = stage.engine._tables.values()
    tensors = [table.latents, table.velocity, table.source, table.noise, table.mask, table.programs]
    tensors += [*table.conditioning.values(), *table.inputs.values()]
    held = sum(one.numel() * one.element_size() for one in tensors)
    # One row more than slots, which takes what padding computes.
    assert held == 4 * plan(folder, torch.float32).slot_bytes


def test_a_part_that_overflows_in_half_precision_is_planned_in_float32(tmp_path: Path) -> None:
    folder = save_sdxl_checkpoint(tmp_path / "sdxl")
    config = folder / "vae" / "config.json"
    for upcast in (True, False):
        config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": upcast}))
        planned = plan(Checkpoint(folder, flow="perflow"), torch.float16).parts
        (part,) = [part for part in planned if part.name == "vae_decoder"]
        assert part.memory_bytes == part.parameters * (4 if upcast else 2)


def test_a_checkpoint_that_cannot_be_served_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--flow"):
        plan(save_sdxl_checkpoint(tmp_path / "sdxl"), torch.float32)
