"""The files of `streamflow redis-acl`: users for Redis to read, and a password of each to give to its process."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamflow.errors import InvalidRequestError
from streamflow.model_names import DEPLOYMENT, deployment_of
from streamflow.transport.acl import DEFAULT_OFF, RIGHTS, administrator_line, user_line
from streamflow.transport.keys import prefix_of

ADMINISTRATOR = "administrator"
USERS_FILE = "users.acl"
_PASSWORD_BYTES = 32
_LEAST_CHARACTERS = 16
_KEYS_OF = re.compile(re.escape("~" + prefix_of("NAME")).replace("NAME", f"({DEPLOYMENT})"))


@dataclass(frozen=True, slots=True)
class User:
    """Attributes: role: a key of RIGHTS, or empty for the administrator; deployments: whose keys it may touch."""

    name: str
    role: str
    deployments: tuple[str, ...]

    @property
    def password_file(self) -> str:
        return f"{self.name}.password"

    def line(self, password_sha256: str) -> str:
        if not self.role:
            return administrator_line(self.name, password_sha256)
        return user_line(self.name, RIGHTS[self.role], self.deployments, password_sha256)


@dataclass(frozen=True, slots=True)
class _Old:
    """A user of the file as it was."""

    text: str

    @property
    def name(self) -> str:
        return self.text.split()[1]

    @property
    def deployments(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_KEYS_OF.findall(self.text)))

    def renewed(self) -> str:
        """With the rights of this version and the password of before; as it is, where it is none of ours."""
        rules = self.text.split()[2:]
        hashes = [rule[1:] for rule in rules if rule.startswith("#")]
        for role in RIGHTS:
            if self.name in {f"{one}-{role}" for one in self.deployments} and len(hashes) == 1 and "on" in rules:
                return User(self.name, role, self.deployments).line(hashes[0])
        return self.text


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


def write(folder: Path, users: Sequence[User], *, only: bool = False) -> list[str]:
    """Writes users.acl, and the passwords that are not there yet; the names of further users that it keeps.

    Redis forgets whoever is not in the file when it loads it. So users of other deployments and models that stand in it
    stay, and a gateway may go on to touch what it could.

    Args:
        only: no others stay.

    Raises:
        InvalidRequestError: the folder cannot be written to, or a password that is there is too short.
    """
    path = folder / USERS_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = {} if only else {user.name: user for user in _read(path)}
        ours = [_joined(user, old.pop(user.name, None)) for user in users]
        lines = [user.line(_sha256(_password(folder / user.password_file))) for user in ours]
        lines += [user.renewed() for user in old.values()]
        path.write_text("\n".join([DEFAULT_OFF, *lines]) + "\n", "utf-8", errors="surrogateescape")
    except OSError as error:
        raise InvalidRequestError("dir", folder, "a folder that can be written to", error.strerror or "") from error
    return list(old)


def _read(path: Path) -> Iterator[_Old]:
    if path.exists():
        for line in path.read_text("utf-8", errors="surrogateescape").splitlines():
            if line.startswith("user ") and line.split()[1:2] not in ([], ["default"]):
                yield _Old(line)


def _joined(user: User, old: _Old | None) -> User:
    if old is None or not user.role:
        return user
    return replace(user, deployments=tuple(dict.fromkeys((*user.deployments, *old.deployments))))


def _sha256(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


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
