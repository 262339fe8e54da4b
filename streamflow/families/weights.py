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
from streamflow.families.files import pickles, weight_files

_MOST_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class PartWeights:
    """What a part holds.

    Attributes:
        parameters: numbers, over all tensors.
        dtypes: as they are stored, by safetensors' names.
    """

    parameters: int
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
            hint = f'where the family can do without it, write "{folder}": [null, null] there'
            raise InvalidRequestError("model", checkpoint.folder, allowed, hint)
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
        # Their numbers cannot be read without loading them; they are as many as their bytes allow.
        return PartWeights(sum(path.stat().st_size for path in pickles(part)) // 4, ("?",))
    tensors = [tensor for path in files for tensor in _header(path) if tensor.name.partition(".")[0] not in without]
    return PartWeights(
        sum(prod(tensor.shape) for tensor in tensors),
        tuple(sorted({tensor.dtype for tensor in tensors})),
    )


def _refuse_without(part: Path, allow_pickle: bool) -> None:
    """Raises InvalidRequestError, unless other formats were allowed and are there."""
    others = pickles(part)
    if not others:
        raise InvalidRequestError("model", part, "a part with its weights, *.safetensors; there are none")
    if not allow_pickle:
        hint = (
            "such files can run code: convert them, or allow them where you trust them (STREAMFLOW_ALLOW_PICKLE=true)"
        )
        raise InvalidRequestError("model", others[0], "weights as safetensors", hint)


def _header(path: Path) -> list[_Tensor]:
    """What the file says that it holds; it is as long as that needs.

    Raises:
        InvalidRequestError: it is not.
    """
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        reason = f"it is cut or damaged: {error}"
        raise InvalidRequestError("model", path, "a whole safetensors file", reason) from error
