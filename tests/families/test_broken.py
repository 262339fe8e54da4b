"""Folders that are incomplete, damaged or untrustworthy: one clear error that names the part, before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamflow import families
from streamflow.backends.torch_eager import TorchRunner
from streamflow.errors import InvalidRequestError
from streamflow.families.checkpoint import Checkpoint
from streamflow.types import DecoderKind
from tests.checkpoints.transformers import save_sd3_checkpoint

FLOAT = partial(TorchRunner, device=torch.device("cpu"), dtype=torch.float32)
CLIP = "text_encoder_2/model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3_checkpoint(tmp_path_factory.mktemp("whole") / "sd3")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy")


def drop_folder(folder: Path) -> str:
    shutil.rmtree(folder / "text_encoder_3")
    return "a folder text_encoder_3, which its model_index.json declares"


def drop_weights(folder: Path) -> str:
    (folder / TRANSFORMER).unlink()
    return r"transformer'; allowed: a part with its weights"


def cut(folder: Path) -> str:
    path = folder / CLIP
    path.write_bytes(path.read_bytes()[:-7])
    return r"text_encoder_2/model.safetensors'; allowed: a whole safetensors file; it is cut"


def leave_a_pointer(folder: Path) -> str:
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    return r"vae/diffusion_pytorch_model.safetensors'; allowed: a whole safetensors file"


def pickle_it(folder: Path) -> str:
    torch.save(load_file(folder / TRANSFORMER), folder / "transformer/diffusion_pytorch_model.bin")
    (folder / TRANSFORMER).unlink()
    return r"diffusion_pytorch_model.bin'; allowed: weights as safetensors; .*ALLOW_PICKLE=true"


def drop_a_shard(folder: Path) -> str:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (folder / "text_encoder_2/model.safetensors.index.json").write_text(json.dumps(index))
    return r"text_encoder_2'; allowed: a part with all its weights; missing: model-00001-of-00002"


def break_a_config(folder: Path) -> str:
    (folder / "transformer/config.json").write_text("{")
    return r"transformer/config.json'; allowed: a readable JSON file"


def empty_a_config(folder: Path) -> str:
    (folder / "transformer/config.json").write_text("{}")
    return r"configs are whole; a config lacks 'patch_size'"


@pytest.mark.parametrize(
    "damage",
    [drop_folder, drop_weights, cut, leave_a_pointer, pickle_it, drop_a_shard, break_a_config, empty_a_config],
)
def test_what_headers_tell_is_refused_by_every_process(folder: Path, damage: Callable[[Path], str]) -> None:
    expected = damage(folder)
    with pytest.raises(InvalidRequestError, match=expected):
        families.describe(folder)


def test_pickles_are_loaded_where_they_were_allowed(folder: Path) -> None:
    pickle_it(folder)
    denoiser = families.load_denoiser(Checkpoint(folder, allow_pickle=True), FLOAT)
    assert denoiser.networks["base"].name == "torch-eager"


def test_weights_of_another_shape_are_named_with_their_part(folder: Path) -> None:
    tensors = load_file(folder / TRANSFORMER)
    save_file({**tensors, "proj_out.bias": torch.zeros(3)}, folder / TRANSFORMER)
    with pytest.raises(
        InvalidRequestError, match=r"transformer'; allowed: a part .* whose files fit together;.*proj_o"
    ):
        families.load_denoiser(folder, FLOAT)
    # The other stages do not load it.
    families.load_decoder(folder, DecoderKind.FULL, FLOAT)


@pytest.mark.parametrize(("path", "load"), [(CLIP, "load_text_encoder"), (TRANSFORMER, "load_denoiser")])
def test_a_tensor_that_is_missing_is_not_made_up(folder: Path, path: str, load: str) -> None:
    """The libraries would fill it with random numbers and say so in a log."""
    tensors = load_file(folder / path)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, folder / path, {"format": "pt"})
    with pytest.raises(InvalidRequestError, match=rf"{Path(path).parent}'; .*1 tensors are missing.*"):
        getattr(families, load)(folder, FLOAT)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for file in (folder / "tokenizer_2").iterdir():
        file.unlink()
    with pytest.raises(InvalidRequestError, match="tokenizer_2'"):
        families.load_text_encoder(folder, FLOAT)


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="folder of a checkpoint in diffusers layout"):
        families.describe(tmp_path / "nothing")
    with pytest.raises(InvalidRequestError, match=r"with model_index.json"):
        families.describe(tmp_path)
