"""What an operator writes, and the checkpoint that it becomes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamflow import families
from streamflow.backends.torch_eager import TorchRunner
from streamflow.config import ModelSettings
from streamflow.errors import InvalidRequestError, UnavailableError
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.source import checkpoint_from
from streamflow.flow.spec import WindowSpec
from tests.checkpoints.sd import save_sd_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd_checkpoint(tmp_path_factory.mktemp("source") / "sd", diffusion=True)


@pytest.fixture
def hub(diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub library's cache with one model, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--org--small"
    shutil.copytree(diffusion, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo


def settings(tmp_path: Path, model: Path | str, **more: object) -> ModelSettings:
    return ModelSettings(model=model, cache=tmp_path / "cache", **more)  # type: ignore[arg-type]


def test_a_name_on_the_hub_is_found_where_it_was_downloaded(hub: Path, tmp_path: Path) -> None:
    for name in ("org/small", f"org/small@{COMMIT}"):
        checkpoint = checkpoint_from(settings(tmp_path, name, flow="instaflow"))
        assert checkpoint.folder == hub / "snapshots" / COMMIT
        assert families.describe(checkpoint).name == "small"


@pytest.mark.parametrize("name", ["org/other", "org/small@other"])
def test_offline_what_was_not_downloaded_is_told(hub: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnavailableError, match=f"there is no folder {name} here, .*; give the folder of a checkpoint"):
        checkpoint_from(settings(tmp_path, name))


def test_the_tiny_autoencoder_of_a_family_is_found_by_its_name(hub: Path, diffusion: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(diffusion, tmp_path / "copy")
    published = tmp_path / "hub" / "models--madebyollin--taesd"
    (published / "snapshots").mkdir(parents=True)
    shutil.move(copy / "tiny_vae", published / "snapshots" / COMMIT)
    (published / "refs").mkdir()
    (published / "refs" / "main").write_text(COMMIT)
    checkpoint = checkpoint_from(settings(tmp_path, copy, flow="perflow", tiny_vae="family"))
    assert checkpoint.tiny_folder == published / "snapshots" / COMMIT
    assert families.describe(checkpoint).decoders == ("tiny", "full")


def test_what_the_scheduler_does_not_tell_is_a_setting(diffusion: Path) -> None:
    """PeRFlow's weights are published beside a scheduler that anybody's are."""
    with pytest.raises(InvalidRequestError, match=r"flow: got 'none for .*'; .* PNDMScheduler, .*set --flow"):
        families.describe(diffusion)
    with pytest.raises(InvalidRequestError, match="flow: got 'straight'; allowed: one of auto, rectified"):
        families.describe(Checkpoint(diffusion, flow="straight"))
    perflow = families.describe(Checkpoint(diffusion, flow="perflow"))
    assert perflow.flow.windows == WindowSpec("diff_eps")
    assert (perflow.default_sampler, perflow.default_steps, perflow.default_guidance_scale) == ("perflow", 8, 7.5)
    # Replicas that take the weights for something else are of another revision.
    assert perflow.revision != families.describe(Checkpoint(diffusion, flow="instaflow")).revision


def test_the_scheduler_or_the_folder_may_tell_the_flow(diffusion: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(diffusion, tmp_path / "copy")
    (copy / "streamflow.json").write_text('{"flow": "perflow"}')
    assert families.describe(copy).default_sampler == "perflow"
    (copy / "streamflow.json").unlink()
    scheduler = copy / "scheduler" / "scheduler_config.json"
    told = {"_class_name": "PeRFlowScheduler", "prediction_type": "ddim_eps", "num_time_windows": 8}
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), **told}))
    assert families.describe(copy).flow.windows == WindowSpec("ddim_eps", windows=8)
    with pytest.raises(InvalidRequestError, match="flow: got 'instaflow'; allowed: perflow or auto, because of"):
        families.describe(Checkpoint(copy, flow="instaflow"))


def test_delta_weights_are_added_to_the_unet_of_any_base(diffusion: Path, tmp_path: Path) -> None:
    own = load_file(diffusion / "unet" / "diffusion_pytorch_model.safetensors")
    delta = {name: 0.01 * torch.randn_like(values) for name, values in own.items()}
    save_file(delta, tmp_path / "delta.safetensors")
    merged = shutil.copytree(diffusion, tmp_path / "merged")
    save_file(
        {name: values + delta[name] for name, values in own.items()},
        merged / "unet" / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    with_delta = Checkpoint(diffusion, flow="perflow", unet_delta=tmp_path / "delta.safetensors")
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([900.0, 10.0]), {"prompt_embeds": torch.randn(2, 12, 16)})
    outputs = [
        families.load_denoiser(one, _float).networks["base"](*inputs)
        for one in (with_delta, Checkpoint(merged, flow="perflow"))
    ]
    assert torch.equal(*outputs)
    plain = families.describe(Checkpoint(diffusion, flow="perflow"))
    assert families.describe(with_delta).revision != plain.revision
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InvalidRequestError, match=r"foreign.safetensors.*not the network's, such as conv_in.weight"):
        families.load_denoiser(
            Checkpoint(diffusion, flow="perflow", unet_delta=tmp_path / "foreign.safetensors"), _float
        )


def test_a_folder_may_say_all_that_belongs_to_it(diffusion: Path, tmp_path: Path) -> None:
    """So a further model of a deployment needs no settings of its own."""
    copy = shutil.copytree(diffusion, tmp_path / "copy")
    shutil.copytree(copy / "tiny_vae", copy / "small")
    (copy / "loras").mkdir()
    (copy / "loras" / "ink.safetensors").write_bytes(
        (copy / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    (copy / "streamflow.json").write_text('{"flow": "perflow", "adapters": "loras", "tiny_vae": "small"}')
    checkpoint = checkpoint_from(settings(tmp_path, copy))
    assert dict(checkpoint.adapters) == {"ink": copy / "loras" / "ink.safetensors"}
    assert checkpoint.tiny_folder == copy / "small"
    assert families.describe(checkpoint).adapters == ("ink",)


@pytest.mark.parametrize("said", ['"/etc"', '"../elsewhere"', "5"])
def test_a_folder_names_nothing_outside_of_it(diffusion: Path, tmp_path: Path, said: str) -> None:
    """It may have been downloaded."""
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copytree(diffusion, tmp_path / "copy")
    (copy / "streamflow.json").write_text(f'{{"flow": "perflow", "adapters": {said}}}')
    with pytest.raises(
        InvalidRequestError, match=r"streamflow.json: adapters: got .*; allowed: a (path in the checkp|text)"
    ):
        checkpoint_from(settings(tmp_path, copy))


def test_a_folder_that_is_missing_in_one_that_is_there_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequestError, match="got 'checkpoints/sd'; allowed: the folder of a checkpoint"):
        families.describe(checkpoint_from(settings(tmp_path, "checkpoints/sd")))


def test_other_forms_of_the_same_weights_are_not_of_the_revision(diffusion: Path, tmp_path: Path) -> None:
    """Other tools put them into the same folder; what changes tensors is of it."""
    copy = shutil.copytree(diffusion, tmp_path / "copy")
    before = families.describe(Checkpoint(copy, flow="perflow")).revision
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not loaded")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    assert families.describe(Checkpoint(copy, flow="perflow")).revision == before
    (copy / "streamflow.json").write_text('{"max_width": 128}')
    assert families.describe(Checkpoint(copy, flow="perflow")).revision != before


def test_an_adapter_and_a_control_of_one_name_are_both_of_the_revision(diffusion: Path, tmp_path: Path) -> None:
    for kind in ("adapters", "controls"):
        (tmp_path / kind / "edges").mkdir(parents=True)
        (tmp_path / kind / "edges" / "weights.safetensors").write_bytes(kind.encode())
    kinds = {
        "adapters": {"edges": tmp_path / "adapters" / "edges"},
        "controls": {"edges": tmp_path / "controls" / "edges"},
    }
    revisions = {
        Checkpoint(diffusion, **chosen).revision("weights")
        for chosen in ({}, {"adapters": kinds["adapters"]}, {"controls": kinds["controls"]}, kinds)
    }
    assert len(revisions) == 4


def test_digests_of_large_files_are_computed_once(diffusion: Path, tmp_path: Path) -> None:
    """And once more when a file was changed, even where its size is the same."""
    from streamflow.families import files as module

    large = tmp_path / "large"
    (large / "unet").mkdir(parents=True)
    weights = large / "unet" / "weights.safetensors"
    weights.write_bytes(b"\0" * (2 * 2**20))
    digests = tmp_path / "cache" / "digests.json"
    source = Checkpoint(large, digests=digests)
    before = source.weights_revision(["unet"])
    (written,) = json.loads(digests.read_text()).items()
    module._DIGESTS.clear()
    digests.write_text(json.dumps({written[0]: "00" * 32}))
    assert source.weights_revision(["unet"]) != before, "what is written down is used"
    weights.write_bytes(b"\1" + b"\0" * (2 * 2**20 - 1))
    changed = source.weights_revision(["unet"])
    assert changed not in (before, "00" * 32)
    digests.write_text("broken")
    module._DIGESTS.clear()
    assert source.weights_revision(["unet"]) == changed


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("adapters", "nowhere", "adapters: got 'nowhere'; allowed: a folder that is there"),
        ("unet_delta", "nowhere", "unet_delta: got 'nowhere'; allowed: a file or folder that is there"),
        ("tiny_vae", "nowhere", "tiny_vae: got 'nowhere'; allowed: a file or folder that is there"),
    ],
)
def test_what_is_not_there_is_told(diffusion: Path, tmp_path: Path, field: str, value: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        checkpoint_from(settings(tmp_path, diffusion, **{field: value}))


def test_a_tiny_autoencoder_from_elsewhere_is_used(diffusion: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(diffusion, tmp_path / "copy")
    shutil.move(copy / "tiny_vae", tmp_path / "tiny")
    assert families.describe(Checkpoint(copy, flow="perflow")).decoders == ("full",)
    elsewhere = checkpoint_from(settings(tmp_path, copy, flow="perflow", tiny_vae=tmp_path / "tiny"))
    assert families.describe(elsewhere).decoders == ("tiny", "full")


def _float(part: object) -> TorchRunner:
    return TorchRunner(part, device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"t5_token": 8}, "streamflow.json: got 't5_token'; allowed: one of default_steps, .*t5_tokens"),
        ({"max_width": -3}, "streamflow.json: max_width: got -3; allowed: a whole number from 8"),
        ({"max_width": 16}, "streamflow.json: max_width: got 16; allowed: 64 or more, which is the default"),
        ({"default_steps": "eight"}, "streamflow.json: default_steps: got 'eight'; allowed: a whole number from 1"),
        ({"default_steps": 500}, "streamflow.json: max_steps: got 100; allowed: 500 or more"),
        ({"default_sampler": "nonsense"}, "streamflow.json: default_sampler: got .*nonsense.*; allowed: one of euler"),
        ({"default_sampler": "euler"}, "streamflow.json: default_sampler: got .*euler.*; allowed: perflow"),
        ({"default_guidance_scale": True}, "default_guidance_scale: got True; allowed: a number from 0 to 100"),
        ({"evaluates_data": 1}, "evaluates_data: got 1; allowed: true or false"),
        ({"default_decoder": "best"}, "default_decoder: got 'best'; allowed: one of tiny, full"),
        ({"flow": "straight"}, "streamflow.json: flow: got 'straight'; allowed: one of auto, rectified"),
    ],
)
def test_what_a_folder_recommends_is_checked(
    diffusion: Path, tmp_path: Path, said: dict[str, object], message: str
) -> None:
    copy = shutil.copytree(diffusion, tmp_path / "copy")
    (copy / "streamflow.json").write_text(json.dumps({"flow": "perflow", **said}))
    with pytest.raises(InvalidRequestError, match=message):
        families.describe(copy)
