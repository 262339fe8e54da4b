"""Model families: what of a checkpoint each stage loads, and how it is called.

Importing this package, and `describe`, need no torch; each `load_` function imports what it loads with.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from streamflow.errors import InvalidRequestError
from streamflow.families.base import Denoiser, LatentDecoder, TextEncoder, VaeEncoder
from streamflow.families.checkpoint import read_json
from streamflow.types import DecoderKind, ModelCard

if TYPE_CHECKING:
    import torch

FAMILIES = {"StableDiffusionPipeline": "streamflow.families.sd"}
"""Module of each family by the pipeline class that model_index.json names."""


def describe(path: Path | str, name: str = "") -> ModelCard:
    """What the checkpoint offers, read from its configs.

    Raises:
        InvalidRequestError: no checkpoint of a known family is there, or a part is missing.
    """
    folder = Path(path)
    card: ModelCard = _family(folder).describe(folder, name or folder.resolve().name)
    return card


def load_text_encoder(path: Path | str, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    encoder: TextEncoder = _loader(Path(path)).load_text_encoder(Path(path), device=device, dtype=dtype)
    return encoder


def load_vae_encoder(path: Path | str, *, device: torch.device, dtype: torch.dtype) -> VaeEncoder:
    encoder: VaeEncoder = _loader(Path(path)).load_vae_encoder(Path(path), device=device, dtype=dtype)
    return encoder


def load_denoiser(
    path: Path | str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "",
    row_counts: tuple[int, ...] | None = None,
) -> Denoiser:
    """Args: row_counts: pad every network call to one of these; None = any."""
    folder = Path(path)
    denoiser: Denoiser = _loader(folder).load_denoiser(
        folder, card=describe(folder, name), device=device, dtype=dtype, row_counts=row_counts
    )
    return denoiser


def load_decoder(path: Path | str, kind: DecoderKind, *, device: torch.device, dtype: torch.dtype) -> LatentDecoder:
    decoder: LatentDecoder = _loader(Path(path)).load_decoder(Path(path), kind, device=device, dtype=dtype)
    return decoder


def _family(folder: Path) -> ModuleType:
    pipeline = read_json(folder, "model_index.json").get("_class_name")
    if pipeline not in FAMILIES:
        raise InvalidRequestError("model", pipeline, "a checkpoint whose model_index.json names " + ", ".join(FAMILIES))
    return import_module(FAMILIES[pipeline])


def _loader(folder: Path) -> ModuleType:
    """The family's module, with the libraries that it loads with told to be quiet: our own logs say what is loaded."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return _family(folder)
