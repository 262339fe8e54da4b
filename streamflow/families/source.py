"""From what an operator writes to a checkpoint on this machine: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamflow.config import ModelSettings
from streamflow.errors import InvalidRequestError, StreamFlowError, UnavailableError, install, shorten
from streamflow.families import published_tiny
from streamflow.families.advice import ADVICE
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.flows import AUTO, check_flow

DIGESTS = "digests.json"
OF_FAMILY = "family"
_ON_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_CONFIGS = ("*.json", "*.txt", "*.model")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checkpoint_from(settings: ModelSettings) -> Checkpoint:
    """What the settings of a process name. Raises as `open_checkpoint` does."""
    return open_checkpoint(
        settings.model,
        label=settings.model_name,
        flow=settings.flow,
        unet_delta=settings.unet_delta,
        tiny_vae=settings.tiny_vae,
        adapters=settings.adapters,
        controls=settings.controls,
        allow_pickle=settings.allow_pickle,
        digests=settings.cache / DIGESTS,
    )


def checkpoint_at(model: Path | None, *, flow: str = "auto") -> Checkpoint:
    """The checkpoint that a command names, with what the environment says of it.

    Args:
        model: None = what the environment says, or the built-in one.
        flow: "auto" = what the environment says.

    Raises:
        InvalidRequestError, UnavailableError: see `open_checkpoint`.
    """
    check_flow(flow)
    given: dict[str, Any] = {"model": model, "flow": None if flow == AUTO else flow}
    return checkpoint_from(ModelSettings(**{name: value for name, value in given.items() if value is not None}))


def open_checkpoint(
    model: Path | str,
    *,
    label: str = "",
    flow: str = "auto",
    unet_delta: Path | None = None,
    tiny_vae: Path | None = None,
    adapters: Path | None = None,
    controls: Path | None = None,
    allow_pickle: bool = False,
    digests: Path | None = None,
) -> Checkpoint:
    """A model on the hub is downloaded, unless it was.

    Args:
        model: a folder, or a name on the hub.
        tiny_vae: likewise; or "family", for the one that is published for the model's family.
        adapters, controls: folders of them.

    What is not given may be said in the checkpoint's streamflow.json, as paths in its folder.

    Raises:
        InvalidRequestError: there is no such folder or model, or what belongs to it is not there.
        UnavailableError: the hub cannot be reached.
    """
    model = Path(model)
    folder = local_folder(model, allow_pickle=allow_pickle)
    advice = Checkpoint(folder).recommended

    def beside(field: str, given: Path | None) -> Path | None:
        """What was given, or what the checkpoint says, as a path in its folder."""
        return given or (_inside(folder, field, advice[field]) if field in advice else None)

    return Checkpoint(
        folder,
        label=label or default_name(model),
        flow=flow,
        unet_delta=_existing("unet_delta", beside("unet_delta", unet_delta)),
        tiny_vae=_tiny_vae(beside("tiny_vae", tiny_vae), folder, allow_pickle),
        adapters=_named("adapters", beside("adapters", adapters), (".safetensors",)),
        controls=_named("controls", beside("controls", controls), ()),
        allow_pickle=allow_pickle,
        digests=digests,
    )


def default_name(model: Path) -> str:
    """By which clients know a model on the hub; empty for a folder, which has its own."""
    found = _on_hub(model)
    return found["repo"].partition("/")[2] if found else ""


def _on_hub(model: Path) -> re.Match[str] | None:
    """A folder that is not there, in one that is, is a mistake rather than a name on the hub."""
    return None if model.is_dir() or Path(*model.parts[:1]).is_dir() else _ON_HUB.fullmatch(str(model))


def local_folder(model: Path, *, allow_pickle: bool = False, single: bool = False) -> Path:
    """The folder itself, or that into which a model of the hub, such as `org/name` or `org/name@revision`, was put.

    Where the hub's library is told to stay offline (HF_HUB_OFFLINE) only what was downloaded before is found.

    Args:
        single: one network, rather than a folder for each.

    Raises:
        InvalidRequestError: neither a folder nor a model that can be had.
        UnavailableError: the hub cannot be reached, or its library is not installed.
    """
    found = _on_hub(model)
    if found is None:
        return model
    return _download(found["repo"], found["revision"], allow_pickle=allow_pickle, single=single)


def _download(repo: str, revision: str | None, *, allow_pickle: bool, single: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        message = f"there is no folder {repo}; models of the hub need huggingface_hub; {install('serve')}"
        raise UnavailableError(message) from error
    weights = ("*.safetensors", "*.bin") if allow_pickle else ("*.safetensors",)
    # Not single files beside the folders: many checkpoints have all weights once more in one.
    wanted = [pattern if single else f"*/{pattern}" for pattern in (*weights, *_CONFIGS)]
    with _hub_errors(repo, revision):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["model_index.json", "streamflow.json", *wanted],
                ignore_patterns=["safety_checker/*", "feature_extractor/*", "*.fp16.*", "*.non_ema.*", "*.onnx*"],
            )
        )


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    allowed = "the folder of a checkpoint in diffusers layout, or a model's name on the Hugging Face hub"
    try:
        yield
    except StreamFlowError:
        raise
    except GatedRepoError as error:
        hint = "accept its licence there, and set HF_TOKEN"
        raise InvalidRequestError("model", name, "a model that you have access to", hint) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        hint = "there is no such folder here, and no such model or revision there (a private one needs HF_TOKEN)"
        raise InvalidRequestError("model", name, allowed, hint) from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = shorten(" ".join(str(error).split()))
        message = (
            f"model: there is no folder {name} here, and the Hugging Face hub cannot be asked for that name; "
            f"give the folder of a checkpoint, or download it where there is a network ({reason})"
        )
        raise UnavailableError(message) from error


def _tiny_vae(given: Path | None, folder: Path, allow_pickle: bool) -> Path | None:
    if given is None:
        return None
    published = Path(published_tiny(folder)) if given == Path(OF_FAMILY) else given
    return _existing("tiny_vae", local_folder(published, allow_pickle=allow_pickle, single=True))


def _inside(folder: Path, field: str, said: object) -> Path:
    """It may come from the hub: nothing outside of it is looked at."""
    # Not resolved: the hub's own files are links to where it keeps them.
    path = Path(os.path.normpath(folder / said)) if isinstance(said, str) else None
    if path is None or not path.is_relative_to(os.path.normpath(folder)):
        raise InvalidRequestError(f"{ADVICE}: {field}", said, "a path in the checkpoint's folder")
    return path


def _existing(field: str, path: Path | None) -> Path | None:
    if path is not None and not path.exists():
        raise InvalidRequestError(field, path, "a file or folder that is there")
    return path


def _named(field: str, folder: Path | None, endings: tuple[str, ...]) -> dict[str, Path]:
    """What is in a folder, by name: folders, and files with these endings."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise InvalidRequestError(field, folder, "a folder that is there")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        # What tools leave there, such as .cache.
        if path.name.startswith(".") or not (path.is_dir() or path.suffix in endings):
            continue
        name = path.name if path.is_dir() else path.stem
        if not _NAME.fullmatch(name) or name in found:
            raise InvalidRequestError(field, path.name, "names of their own, of A-Z a-z 0-9 . _ -, at most 64")
        found[name] = path
    return found
