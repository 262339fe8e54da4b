"""Where pictures go: names that are fixed, and tried, before there is any work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from streamflow.client import GenerateOptions

# Their names are made before the server, whose limit is lower as a rule, is asked.
_MOST_FILES = 10_000


def choose_names(output: str, options: GenerateOptions, *, count: int, overwrite: bool) -> list[Path]:
    """The files of a request; fixes its id and its seed, because names may hold them.

    Raises:
        typer.BadParameter: too many, no names for them, one that is taken, or one that cannot be written.
    """
    from streamflow.client.request import image_format, new_request_id, seed_of
    from streamflow.client.result import output_paths, suffix_of

    if count > _MOST_FILES:
        allowed = f"at most {_MOST_FILES:,} images over all prompts; run the command several times"
        raise typer.BadParameter(f"got {count:,} images; {allowed}", param_hint="--num-images")
    request_id = options["request_id"] = new_request_id()
    seed = options["seed"]
    first = options["seed"] = seed_of(request_id) if seed is None else seed
    suffix = suffix_of(image_format(options["format"]))
    try:
        paths = output_paths(output, request_id=request_id, seeds=range(first, first + max(count, 1)), suffix=suffix)
        _try_out(paths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}", param_hint="--output") from None
    taken = [path for path in paths if path.exists() and str(path) != str(Path(output))]
    if taken and not overwrite:
        raise typer.BadParameter(f"{taken[0]} exists; choose another name or add --overwrite", param_hint="--output")
    return paths


def write(files: Sequence[bytes], paths: Sequence[Path]) -> None:
    """Raises OSError."""
    for path, data in zip(paths, files, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _try_out(paths: Sequence[Path]) -> None:
    """Raises OSError where a file could not be written; leaves nothing behind."""
    with ExitStack() as undo:
        for path in paths:
            for folder in reversed([above for above in path.parents if not above.exists()]):
                folder.mkdir()
                undo.callback(folder.rmdir)
            if path.exists() and not path.is_file():
                # A pipe, say: opening it may wait, or be heard at its other end.
                continue
            new = not path.exists()
            path.open("ab").close()
            if new:
                undo.callback(path.unlink)
