"""Model families: what of a checkpoint each stage loads, and how it is called.

Importing this package, and `describe`, need no torch; each `load_` function imports what it loads with. A checkpoint is
a folder, or a `Checkpoint` with what its operator says besides.

A family is a module in `FAMILIES` with these functions, of a checkpoint and its card:

    describe            the card itself
    towers              the specs of its text encoders
    load_text_encoder   a TextEncoder of them
    networks            the parts that the denoiser runs, by the names that programs use
    load_denoiser       a Denoiser of them
    FOLDERS             that make a checkpoint of it
    TINY                where a tiny autoencoder for its latents is published
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamflow.errors import InvalidRequestError, StreamFlowError
from streamflow.families import autoencoders
from streamflow.families.base import Denoiser, LatentDecoder, TextEncoder, VaeEncoder
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.weights import check_parts
from streamflow.types import DecoderKind, ModelCard, Stage

if TYPE_CHECKING:
    from streamflow.backends.parts import OpenPart, Part

FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "DiTPipeline": "sit",
}
"""Module of each family by the pipeline class that model_index.json names."""

Source = Checkpoint | Path | str
"""A checkpoint, or its folder."""


def check_checkpoint(source: Source) -> None:
    """Whether a checkpoint is there at all, without a look at its parts.

    Raises:
        InvalidRequestError: there is none, or it is of no known family.
    """
    checkpoint = Checkpoint.of(source)
    if not checkpoint.folder.is_dir():
        raise InvalidRequestError("model", checkpoint.folder, "the folder of a checkpoint in diffusers layout")
    _family(checkpoint)


def describe(source: Source, name: str = "") -> ModelCard:
    """What the checkpoint offers, read from its configs and the headers of its weights.

    Raises:
        InvalidRequestError: no checkpoint of a known family is there, or a part is missing or damaged.
    """
    checkpoint = Checkpoint.of(source, name)
    check_checkpoint(checkpoint)
    family = _family(checkpoint)
    check_parts(checkpoint, family.FOLDERS)
    with _configs_read(checkpoint):
        card: ModelCard = family.describe(checkpoint)
    return card


def published_tiny(source: Source) -> str:
    """The name on the Hugging Face hub of a tiny autoencoder for the family's latents."""
    name: str = _family(Checkpoint.of(source)).TINY
    return name


def parts_by_stage(source: Source) -> dict[Stage, list[Part]]:
    """Every network of the checkpoint, at the stage that loads it."""
    checkpoint = Checkpoint.of(source)
    family, card = _family(checkpoint), describe(checkpoint)
    with _configs_read(checkpoint):
        texts = [tower.part(checkpoint, card.weights_revision) for tower in family.towers(checkpoint, card)]
        return {
            Stage.ENCODE: [*texts, autoencoders.encoder_part(checkpoint, card)],
            Stage.DENOISE: list(family.networks(checkpoint, card).values()),
            Stage.DECODE: [autoencoders.decoder_part(checkpoint, kind, card) for kind in card.decoders],
        }


def parts(source: Source) -> list[Part]:
    """Every network of the checkpoint, to export."""
    return [part for found in parts_by_stage(source).values() for part in found]


def load_text_encoder(source: Source, open_part: OpenPart) -> TextEncoder:
    with _loading(source) as (family, checkpoint, card):
        encoder: TextEncoder = family.load_text_encoder(checkpoint, card, open_part)
    return encoder


def load_vae_encoder(source: Source, open_part: OpenPart) -> VaeEncoder:
    with _loading(source) as (_, checkpoint, card):
        return autoencoders.ImageEncoder(open_part(autoencoders.encoder_part(checkpoint, card)))
    raise AssertionError("errors leave the context")


def load_decoder(source: Source, kind: DecoderKind, open_part: OpenPart) -> LatentDecoder:
    with _loading(source) as (_, checkpoint, card):
        return autoencoders.Decoder(open_part(autoencoders.decoder_part(checkpoint, kind, card)))
    raise AssertionError("errors leave the context")


def load_denoiser(source: Source, open_part: OpenPart) -> Denoiser:
    with _loading(source) as (family, checkpoint, card):
        denoiser: Denoiser = family.load_denoiser(checkpoint, card, open_part)
    return denoiser


def _family(checkpoint: Checkpoint) -> Any:
    pipeline = checkpoint.index.get("_class_name")
    if pipeline not in FAMILIES:
        raise InvalidRequestError("model", pipeline, "a checkpoint whose model_index.json names " + ", ".join(FAMILIES))
    return import_module(f"streamflow.families.{FAMILIES[pipeline]}")


@contextmanager
def _loading(source: Source) -> Iterator[tuple[Any, Checkpoint, ModelCard]]:
    """What all loaders take: the family's module, the checkpoint and its card.

    Raises:
        InvalidRequestError: for whatever a loader meets in a folder that is incomplete, damaged or inconsistent.
    """
    checkpoint = Checkpoint.of(source)
    card = describe(checkpoint)
    with _configs_read(checkpoint):
        yield _family(checkpoint), checkpoint, card


@contextmanager
def _configs_read(checkpoint: Checkpoint) -> Iterator[None]:
    """Configs come from elsewhere: one that lacks what its class always writes is refused.

    Raises:
        InvalidRequestError: a config lacks a field, or has a value of another kind.
    """
    try:
        yield
    except StreamFlowError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"a config lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        allowed = "a checkpoint whose configs are whole"
        raise InvalidRequestError("model", checkpoint.folder, allowed, reason) from error
