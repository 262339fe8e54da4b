"""The parts of models/shapes on disk: where they are, and how they are read and written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL_DIR = ROOT / "models" / "shapes"
STATE_DIR = ROOT / "out" / "training"

Module = TypeVar("Module", bound=nn.Module)


class Saveable(Protocol):
    def save_pretrained(self, save_directory: str) -> Any: ...


def device() -> torch.device:
    """Where to train: the GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_part(part: Saveable, name: str, *, model_dir: Path = MODEL_DIR) -> None:
    """Saves a part under its folder in one rename, in float16 (a module that is trained on goes through a copy)."""
    final, fresh, old = model_dir / name, model_dir / f".{name}.new", model_dir / f".{name}.old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model_dir.mkdir(parents=True, exist_ok=True)
    part.save_pretrained(str(fresh))
    _forget_origin(fresh / "config.json")
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    shutil.rmtree(old, ignore_errors=True)


def _forget_origin(config: Path) -> None:
    """diffusers writes down from which folder of this machine a part was loaded."""
    if config.exists():
        said = json.loads(config.read_text("utf-8"))
        said.pop("_name_or_path", None)
        config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", "utf-8")


def half_copy(module: Module) -> Module:
    """A float16 copy of a diffusers module for the disk."""
    return copy.deepcopy(module).half()


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MODEL_DIR / "vae", dtype=torch.float32).to(device())


def load_tiny() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(MODEL_DIR / "tiny_vae", dtype=torch.float32).to(device())


def load_unet(name: str = "unet") -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(MODEL_DIR / name, dtype=torch.float32).to(device())


def load_text() -> tuple[CLIPTokenizer, CLIPTextModel]:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(MODEL_DIR / "text_encoder", dtype=torch.float32)
    return tokenizer, encoder.to(device()).eval().requires_grad_(False)
