"""Model families: what of a checkpoint each stage loads, and how it is called.

Importing this package, and `describe`, need no torch; each `load_` function imports what it loads with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from streamflow.errors import InvalidRequestError, StreamFlowError
from streamflow.families.base import Denoiser, LatentDecoder, TextEncoder, VaeEncoder
from streamflow.families.checkpoint import read_json
from streamflow.types import DecoderKind, ModelCard

if TYPE_CHECKING:
    from streamflow.backends.parts import OpenPart, Part

FAMILIES = {"StableDiffusionPipeline": "streamflow.families.sd"}
"""Module of each family by the pipeline class that model_index.json names."""


def check_checkpoint(path: Path | str) -> None:
    """Whether a checkpoint is there at all, without a look at its parts.

    Raises:
        InvalidRequestError: there is none, or it is of no known family.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidRequestError("model", str(folder), "the folder of a checkpoint in diffusers layout")
    _family(folder)


def describe(path: Path | str, name: str = "") -> ModelCard:
    """What the checkpoint offers, read from its configs.

    Raises:
        InvalidRequestError: no checkpoint of a known family is there, or a part is missing.
    """
    folder = Path(path)
    card: ModelCard = _family(folder).describe(folder, name or folder.resolve().name)
    return card


def parts(path: Path | str) -> list[Part]:
    """Every network of the checkpoint, to export."""
    card = describe(path)
    found: list[Part] = _family(Path(path)).parts(Path(path), card)
    return found


def load_text_encoder(path: Path | str, open_part: OpenPart) -> TextEncoder:
    with _loading(path) as (family, about):
        encoder: TextEncoder = family.load_text_encoder(**about, open_part=open_part)
    return encoder


def load_vae_encoder(path: Path | str, open_part: OpenPart) -> VaeEncoder:
    with _loading(path) as (family, about):
        encoder: VaeEncoder = family.load_vae_encoder(**about, open_part=open_part)
    return encoder


def load_decoder(path: Path | str, kind: DecoderKind, open_part: OpenPart) -> LatentDecoder:
    with _loading(path) as (family, about):
        decoder: LatentDecoder = family.load_decoder(**about, kind=kind, open_part=open_part)
    return decoder


def load_denoiser(path: Path | str, open_part: OpenPart, *, name: str = "") -> Denoiser:
    with _loading(path, name) as (family, about):
        denoiser: Denoiser = family.load_denoiser(**about, open_part=open_part)
    return denoiser


def _family(folder: Path) -> ModuleType:
    pipeline = read_json(folder, "model_index.json").get("_class_name")
    if pipeline not in FAMILIES:
        raise InvalidRequestError("model", pipeline, "a checkpoint whose model_index.json names " + ", ".join(FAMILIES))
    return import_module(FAMILIES[pipeline])


@contextmanager
def _loading(path: Path | str, name: str = "") -> Iterator[tuple[ModuleType, dict[str, Any]]]:
    """The family's module, and what all its loaders take: the folder and its card.

    Raises:
        InvalidRequestError: for whatever a loader meets in a folder that is incomplete, damaged or inconsistent.
    """
    folder = Path(path)
    family, card = _family(folder), describe(folder, name)
    from safetensors import SafetensorError

    try:
        yield family, {"folder": folder, "card": card}
    except StreamFlowError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidRequestError("model", str(folder), "a checkpoint whose weights can be loaded", reason) from error
