"""Classes of the libraries that load checkpoints, imported when one is needed and told to be quiet.

A stage whose networks run as graphs needs few of them, and starts in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamflow.errors import InvalidRequestError, StreamFlowError

if TYPE_CHECKING:
    import torch
    from torch import nn


def from_diffusers(name: str) -> Any:
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return getattr(diffusers, name)


def from_transformers(name: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return getattr(transformers, name)


@dataclass(frozen=True)
class Weights:
    """A network of a checkpoint on disk: calling it loads the module.

    Attributes:
        library: `from_diffusers` or `from_transformers`.
        class_name: in the library.
        folder: with config and weights.
        allow_pickle: see Checkpoint.
        options: more that `from_pretrained` takes.
        finish: what is done to the loaded module before it is used.
        without: its modules that are dropped: what is not used here takes no memory.
    """

    library: Callable[[str], Any]
    class_name: str
    folder: Path
    allow_pickle: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[Any], None] | None = None
    without: tuple[str, ...] = ()

    def __call__(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """In eval mode, on the device, in the precision.

        Raises:
            InvalidRequestError: the weights are missing, cut, of other shapes, or not all there; the message names
                the part.
        """
        with refused(self.folder):
            module: Any
            module, about = self.library(self.class_name).from_pretrained(
                self.folder,
                dtype=dtype,
                use_safetensors=None if self.allow_pickle else True,
                variant=variant(self.folder),
                output_loading_info=True,
                **self.options,
            )
            lacking = [*about["missing_keys"], *about["mismatched_keys"]]
            if lacking:
                raise ValueError(f"{len(lacking)} tensors are missing or of other shapes, such as {lacking[0]}")
        for name in self.without:
            setattr(module, name, None)
        if self.finish is not None:
            self.finish(module)
        loaded: nn.Module = module.to(device).eval()
        return loaded


def variant(folder: Path) -> str | None:
    """The variant, such as "fp16", of weights that are there in no other."""
    names = [path.name for path in folder.glob("*.safetensors")]
    plain = any(name.count(".") == 1 for name in names)
    variants = {name.split(".")[1].split("-")[0] for name in names if name.count(".") == 2}
    return None if plain or len(variants) != 1 else variants.pop()


def one_file(path: Path) -> Path:
    """The safetensors file itself, or the only one in a folder. Raises ValueError."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{len(files)} safetensors files; one is needed")
    return files[0]


@contextmanager
def refused(
    part: Path, *, field: str = "model", allowed: str = "a part of a checkpoint whose files fit together"
) -> Iterator[None]:
    """Turns what libraries raise for files that are incomplete, damaged or inconsistent into one error.

    Raises:
        InvalidRequestError: it names the part.
    """
    from safetensors import SafetensorError

    try:
        yield
    except StreamFlowError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidRequestError(field, part, allowed, reason) from error
