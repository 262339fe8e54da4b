"""Several models behind one gateway: what they are called, and in which deployment each one's work is kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from streamflow.errors import InvalidRequestError

DEPLOYMENT = r"[A-Za-z0-9_-]{1,40}"
"""What a deployment may be called: its name is part of every key in Redis."""

_FIELD = "more_models"
_RENAME = "give it another name, as NAME=PATH"


def name_of(folder: Path | str, name: str = "") -> str:
    """What clients call a model: the name that it was given, or else its folder's."""
    return name or Path(folder).resolve().name


def deployment_of(deployment: str, name: str) -> str:
    """The deployment of a further model; that of the default model is `deployment` itself."""
    return f"{deployment}-{name}"


def read_models(text: str) -> dict[str, Path]:
    """Reads `name=path,name=path`.

    Raises:
        InvalidRequestError: it is written otherwise, or says a name twice.
    """
    items = [item.strip().partition("=") for item in text.split(",") if item.strip()]
    for name, equals, path in items:
        if not name or not path:
            raise InvalidRequestError(_FIELD, name + equals + path, "NAME=PATH, and a comma between several")
    return by_name((name, path) for name, _, path in items)


def by_name(models: Iterable[tuple[str, str]]) -> dict[str, Path]:
    """Folders by name. Raises InvalidRequestError for a name that comes twice."""
    found: dict[str, Path] = {}
    for name, path in models:
        if name in found:
            allowed = f"every name once; {name} is {found[name]} already"
            raise InvalidRequestError(_FIELD, f"{name}={path}", allowed, _RENAME)
        found[name] = Path(path)
    return found


def write_models(models: Mapping[str, Path]) -> str:
    """What `read_models` reads. Raises InvalidRequestError for a folder that cannot be written so."""
    for folder in models.values():
        if "," in str(folder):
            raise InvalidRequestError(_FIELD, str(folder), "a folder without a comma in its path")
    return ",".join(f"{name}={folder}" for name, folder in models.items())


def read_model(text: str) -> tuple[str, str]:
    """Reads PATH or NAME=PATH; the name is empty where there is none.

    No name has a slash, so `./a=b` is a folder.
    """
    name, equals, path = text.partition("=")
    return (name, path) if equals and name and "/" not in name else ("", text)


def check_names(names: Iterable[str], *, deployment: str, default: str) -> None:
    """Whether further models can be called so.

    Args:
        deployment: of the default model.
        default: name of the default model.

    Raises:
        InvalidRequestError: a name that is taken, or that cannot be part of a deployment's.
    """
    for name in names:
        if name == default:
            raise InvalidRequestError(_FIELD, name, "a name other than the default model's", _RENAME)
        if not name or not re.fullmatch(DEPLOYMENT, deployment_of(deployment, name)):
            allowed = f"A-Z a-z 0-9 _ -, and at most 40 of them in {deployment_of(deployment, 'NAME')}"
            raise InvalidRequestError(_FIELD, name, allowed, _RENAME)
