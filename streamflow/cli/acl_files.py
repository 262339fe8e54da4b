"""The files of `streamflow redis-acl`: users for Redis to read, and a password of each to give to its process."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamflow.errors import InvalidRequestError
from streamflow.model_names import DEPLOYMENT, deployment_of
from streamflow.transport.acl import DEFAULT_OFF, RIGHTS, administrator_line, user_line

ADMINISTRATOR = "administrator"
USERS_FILE = "users.acl"
_PASSWORD_BYTES = 32
_LEAST_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class User:
    """Attributes: role: a key of RIGHTS, or empty for the administrator; deployments: whose keys it may touch."""

    name: str
    role: str
    deployments: tuple[str, ...]

    @property
    def password_file(self) -> str:
        return f"{self.name}.password"

    def line(self, password: str) -> str:
        digest = hashlib.sha256(password.encode()).hexdigest()
        if not self.role:
            return administrator_line(self.name, digest)
        return user_line(self.name, RIGHTS[self.role], self.deployments, digest)


def users_of(deployment: str, more_models: Sequence[str]) -> list[User]:
    """The gateway's user for all models, users for the stages of each, and the administrator.

    Raises:
        InvalidRequestError: a deployment or a model cannot be called so.
    """
    deployments = [deployment, *(deployment_of(deployment, model) for model in more_models)]
    for one in deployments:
        if not re.fullmatch(DEPLOYMENT, one):
            raise InvalidRequestError("deployment", one, "1 to 40 of A-Z a-z 0-9 _ -")
    users = [User(f"{deployment}-gateway", "gateway", tuple(deployments))]
    for one in deployments:
        users += [User(f"{one}-{role}", role, (one,)) for role in RIGHTS if role != "gateway"]
    return [*users, User(ADMINISTRATOR, "", ())]


def write(folder: Path, users: Sequence[User]) -> Path:
    """Writes users.acl and the passwords that are not there yet; the path of the former.

    Raises:
        InvalidRequestError: the folder cannot be written to, or a password that is there is too short.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = [user.line(_password(folder / user.password_file)) for user in users]
        path = folder / USERS_FILE
        path.write_text("\n".join([DEFAULT_OFF, *lines]) + "\n", "utf-8")
    except OSError as error:
        raise InvalidRequestError("dir", folder, "a folder that can be written to", error.strerror or "") from error
    return path


def _password(path: Path) -> str:
    if path.exists():
        return _checked(path, path.read_text("utf-8").strip())
    password = secrets.token_urlsafe(_PASSWORD_BYTES)
    # Never there in part: whoever reads it meanwhile would be refused by Redis.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(password)
    os.replace(file.name, path)
    return password


def _checked(path: Path, password: str) -> str:
    if len(password) < _LEAST_CHARACTERS:
        hint = f"it has {len(password)}; delete the file, and a password is made"
        raise InvalidRequestError("password", path, f"a file with {_LEAST_CHARACTERS} characters or more", hint)
    return password
