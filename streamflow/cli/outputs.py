"""Where pictures go: names that are fixed, and tried, before there is any work."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
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
        if output.strip() in ("", "-"):
            raise ValueError(f"got {output!r}; the name of a file or a folder, or a pattern")
        paths = output_paths(output, request_id=request_id, seeds=range(first, first + max(count, 1)), suffix=suffix)
        _check_writable(paths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}", param_hint="--output") from None
    taken = [path for path in paths if path.exists() and str(path) != str(Path(output))]
    if taken and not overwrite:
        raise typer.BadParameter(f"{taken[0]} exists; choose another name or add --overwrite", param_hint="--output")
    return paths


def _check_writable(paths: Sequence[Path]) -> None:
    """Raises OSError, with the file's name, where one could not be written; makes nothing that could be seen."""
    tried = set[Path]()
    for path in paths:
        try:
            folder = next(above for above in path.parents if above.exists())
            if folder not in tried:
                with TemporaryFile(dir=folder):
                    tried.add(folder)
            # Its folder may not be there yet, and then nobody else says that a name is too long.
            (folder / path.name).exists()
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
