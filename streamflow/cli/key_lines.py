"""A file of API keys as lines to change: comments and their places stay."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from streamflow.errors import InvalidRequestError, NotFoundError
from streamflow.rpc.auth import MOST, ApiKeys, Caller, KeyLine, check_tenant, hash_key, read_line
from streamflow.types import Quota

# By which people, and programs that look for leaked secrets, know a key when they see one.
PREFIX = "sf_"
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file; `key` is None for a comment."""

    text: str
    key: KeyLine | None = None

    @classmethod
    def of(cls, key: KeyLine) -> Line:
        return cls(str(key), key)


def read(path: Path, *, missing_ok: bool = False) -> list[Line]:
    """Raises InvalidRequestError for a file that cannot be read, or is none of keys."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        if missing_ok:
            return []
        hint = "`streamflow keys create TENANT` makes one"
        raise InvalidRequestError("file", path, "a file of API keys", f"it is not there; {hint}") from error
    except OSError as error:
        raise InvalidRequestError("file", path, "a file of API keys", error.strerror or "") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError("file", path, "a file of API keys", "it is not text") from error
    try:
        return [Line(line, read_line(line, number)) for number, line in enumerate(text.splitlines(), 1)]
    except ValueError as error:
        raise InvalidRequestError("file", path, "a file of API keys", str(error)) from error


def add(
    lines: Sequence[Line], tenant: str, *, jobs: int | None, images_per_minute: float | None, operator: bool
) -> tuple[str, list[Line]]:
    """A new key, and the lines with its hash; what is given holds for the tenant's other keys too.

    Raises:
        InvalidRequestError: nobody can be called so, or have so much.
    """
    try:
        check_tenant(tenant)
    except ValueError as error:
        raise InvalidRequestError("TENANT", tenant, str(error)) from None
    callers = [line.key.caller for line in lines if line.key is not None and line.key.caller.tenant == tenant]
    before = callers[0] if callers else Caller(tenant)
    quota = Quota(
        before.quota.jobs if jobs is None else jobs,
        before.quota.images_per_minute if images_per_minute is None else images_per_minute,
    )
    _check(quota)
    caller = Caller(tenant, operator or before.operator, quota)
    key = PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    kept = [_as(line, caller) for line in lines]
    return key, [*kept, Line.of(KeyLine(hash_key(key), caller))]


def remove(lines: Sequence[Line], ids: Sequence[str]) -> list[Line]:
    """The lines without the keys of these ids.

    Raises:
        NotFoundError: no key has such an id.
        InvalidRequestError: none would be left, and processes that use the file would keep the old ones.
    """
    known = {line.key.id for line in lines if line.key is not None}
    for id_ in ids:
        if id_ not in known:
            raise NotFoundError(f"no key {id_!r}; `streamflow keys list` shows what there is")
    if known <= set(ids):
        hint = "make another one first: a file without keys is refused, and those of before stay in force"
        raise InvalidRequestError("ID", " ".join(ids), "all keys but one at most", hint)
    return [line for line in lines if line.key is None or line.key.id not in ids]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Others that want to change the file wait, each with `alone`: what one of them revoked would come back otherwise.

    Raises:
        InvalidRequestError: nothing can be written beside the file.
    """
    import fcntl  # not on every system that runs the other commands

    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def check(path: Path, lines: Sequence[Line]) -> str:
    """What the file is with these lines.

    Raises:
        InvalidRequestError: servers would refuse it.
    """
    text = "".join(f"{line.text}\n" for line in lines)
    try:
        ApiKeys.parse(text)
    except ValueError as error:
        raise InvalidRequestError("file", path, "a file of API keys", str(error)) from error
    return text


def write(path: Path, lines: Sequence[Line]) -> None:
    """Puts the new file in the place of the old one at once, so that nobody reads half of it.

    Raises:
        InvalidRequestError: it cannot be written, or servers would refuse it.
    """
    text = check(path, lines)
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
        try:
            _take_over(path, Path(file.name))
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    except OSError as error:
        raise _unwritable(path, error) from error


def _check(quota: Quota) -> None:
    jobs, per_minute = quota.jobs or 0, quota.images_per_minute or 0.0
    if not 0 <= jobs <= MOST:
        raise InvalidRequestError("--jobs", jobs, f"0 to {MOST}")
    if not 0 <= per_minute <= MOST or round(per_minute, 6) != per_minute:
        raise InvalidRequestError("--images-per-minute", per_minute, f"0 to {MOST}, with at most 6 decimals")


def _unwritable(path: Path, error: OSError) -> InvalidRequestError:
    return InvalidRequestError("file", path, "a file that can be written", error.strerror or "")


def _take_over(old: Path, new: Path) -> None:
    """Whose file it is, and who may read it; a new one is its owner's alone."""
    if old.exists():
        shutil.copymode(old, new)
        about = old.stat()
        with suppress(PermissionError):
            os.chown(new, about.st_uid, about.st_gid)


def _as(line: Line, caller: Caller) -> Line:
    if line.key is None or line.key.caller.tenant != caller.tenant or line.key.caller == caller:
        return line
    return Line.of(replace(line.key, caller=caller))
