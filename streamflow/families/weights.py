"""Weight files of a checkpoint's parts, judged by their headers: nothing is loaded, and no library is needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from streamflow.errors import InvalidRequestError
from streamflow.families.checkpoint import Checkpoint

_MOST_HEADER_BYTES = 100 * 2**20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class PartWeights:
    """What a part holds.

    Attributes:
        parameters: numbers, over all tensors.
        file_bytes: on disk.
        dtypes: as they are stored, by safetensors' names.
    """

    parameters: int
    file_bytes: int
    dtypes: tuple[str, ...]


class _Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]


def check_parts(checkpoint: Checkpoint, folders: Iterable[str]) -> None:
    """Whether the parts that a family serves are there, with weights that are whole.

    Args:
        folders: of the family; those that `model_index.json` declares must be there.

    Raises:
        InvalidRequestError: one is missing, cut, or in a format that may run code; the message names it.
    """
    for folder in folders:
        path, declared = checkpoint.folder / folder, checkpoint.index.get(folder)
        if isinstance(declared, list) and declared != [None, None] and not path.is_dir():
            allowed = f"a checkpoint with a folder {folder}, which its model_index.json declares"
            raise InvalidRequestError("model", checkpoint.folder, allowed)
        if (path / "config.json").exists():
            part_weights(path, allow_pickle=checkpoint.allow_pickle)


def part_weights(part: Path, *, allow_pickle: bool = False, without: Sequence[str] = ()) -> PartWeights:
    """Of one network's folder.

    Args:
        without: modules that are not counted.

    Raises:
        InvalidRequestError: see `check_parts`.
    """
    files = weight_files(part)
    if not files:
        _refuse_without(part, allow_pickle)
        return PartWeights(0, sum(path.stat().st_size for path in _pickles(part)), ("?",))
    tensors = [tensor for path in files for tensor in _header(path) if tensor.name.partition(".")[0] not in without]
    return PartWeights(
        sum(prod(tensor.shape) for tensor in tensors),
        sum(path.stat().st_size for path in files),
        tuple(sorted({tensor.dtype for tensor in tensors})),
    )


def weight_files(part: Path) -> list[Path]:
    """The safetensors files from which a part is loaded: all shards, or the one file.

    Raises:
        InvalidRequestError: a shard is missing.
    """
    for index in sorted(part.glob("*.safetensors.index*.json")):
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequestError("model", index, "a readable index of weights", str(error)) from error
        missing = [name for name in shards if not (part / name).is_file()]
        if missing:
            raise InvalidRequestError("model", part, f"a part with all its weights; missing: {missing[0]}")
        return [part / name for name in shards]
    found = sorted(part.glob("*.safetensors"))
    # Variants, such as those in half precision, stand beside the others.
    plain = [path for path in found if path.name.count(".") == 1]
    return plain or found[:1]


def _pickles(part: Path) -> list[Path]:
    return sorted(path for pattern in _PICKLES for path in part.glob(pattern))


def _refuse_without(part: Path, allow_pickle: bool) -> None:
    """Raises InvalidRequestError, unless other formats were allowed and are there."""
    others = _pickles(part)
    if not others:
        raise InvalidRequestError("model", part, "a part with its weights, *.safetensors; there are none")
    if not allow_pickle:
        hint = "such files can run code: convert them, or allow them where you trust them (--allow-pickle)"
        raise InvalidRequestError("model", others[0], "weights as safetensors", hint)


def _header(path: Path) -> list[_Tensor]:
    """What the file says that it holds; it is as long as that needs.

    Raises:
        InvalidRequestError: it is not.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != needed:
            raise ValueError(f"{path.stat().st_size} bytes, of {needed}")
        return [_Tensor(name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        reason = f"it is cut or damaged: {error}"
        raise InvalidRequestError("model", path, "a whole safetensors file", reason) from error
