"""API keys: whose call it is, and what its caller may have.

A file of keys holds their hashes, one a line, so that whoever reads it cannot call:

    sha256:<64 hex digits> TENANT [operator] [jobs=N] [images-per-minute=N]

A key has 256 random bits, which cannot be guessed from a hash however fast it is to compute.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from streamflow.errors import UnauthenticatedError
from streamflow.types import NO_QUOTA, Quota

Metadata = Iterable[tuple[str, str | bytes]]

FORM = "`sha256:<64 hex digits> TENANT [operator] [jobs=N] [images-per-minute=N]`"
HASHED = "sha256:"

_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")
MOST = 999_999_999
"""Of jobs, and of images per minute, which may have 6 decimals."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a key belongs to.

    Attributes:
        tenant: whose jobs it sees; "" where no keys are asked for.
        operator: may also do what concerns all tenants: see the stages, and call and drain them.
    """

    tenant: str
    operator: bool = False
    quota: Quota = NO_QUOTA


ANYBODY = Caller("", operator=True)
"""Who calls where no keys are asked for."""


class Keys(Protocol):
    """`ApiKeys` as they are, or as a file has them at the moment (`KeyFile`)."""

    @property
    def on(self) -> bool:
        """Whether keys are asked for."""
        ...

    def caller(self, metadata: Metadata | None) -> Caller:
        """Whose call this is, by its `authorization: Bearer <key>`.

        Raises:
            UnauthenticatedError: keys are asked for and this one is missing or unknown.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeyLine:
    """One line of a file of keys."""

    digest: bytes
    caller: Caller

    @property
    def id(self) -> str:
        """By which people name it: the beginning of its hash."""
        return self.digest.hex()[:12]

    def __str__(self) -> str:
        quota = self.caller.quota
        words = [HASHED + self.digest.hex(), self.caller.tenant]
        words += ["operator"] if self.caller.operator else []
        words += [f"jobs={quota.jobs}"] if quota.jobs is not None else []
        words += [f"images-per-minute={_plain(quota.images_per_minute)}"] if quota.images_per_minute is not None else []
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of a deployment, by the SHA-256 of each; without any, every call is anybody's."""

    callers: Mapping[bytes, Caller] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str) -> ApiKeys:
        """Reads lines; empty ones and those that begin with # are skipped.

        Raises:
            ValueError: a line that cannot be used, a key that stands there twice, lines of one tenant that differ in
                what it may have, or no key at all. The message tells no key.
        """
        callers: dict[bytes, Caller] = {}
        by_tenant: dict[str, Caller] = {}
        for number, text_line in enumerate(text.splitlines(), 1):
            line = read_line(text_line, number)
            if line is None:
                continue
            tenant = line.caller.tenant
            if line.digest in callers:
                raise ValueError(f"API keys, line {number}: the key {line.id} stands there twice; take one line out")
            if by_tenant.setdefault(tenant, line.caller) != line.caller:
                raise ValueError(
                    f"API keys, line {number}: the keys of {tenant} must all say the same of it; "
                    f"`streamflow keys create {tenant}` keeps them so"
                )
            callers[line.digest] = line.caller
        if not callers:
            raise ValueError("API keys: the file has none; leave the setting out to ask for no keys")
        return cls(callers)

    @property
    def on(self) -> bool:
        """See Keys."""
        return bool(self.callers)

    def caller(self, metadata: Metadata | None) -> Caller:
        """See Keys."""
        if not self.on:
            return ANYBODY
        headers = [value for key, value in metadata or () if key == "authorization"]
        scheme, _, key = str(headers[0]).partition(" ") if headers else ("", "", "")
        if scheme.lower() != "bearer" or not key:
            raise UnauthenticatedError(
                "this deployment asks for an API key: send the metadata `authorization: Bearer <key>` "
                "(api_key of the client, --api-key of the commands)"
            )
        # Every key is compared, in constant time, so that the answer's delay tells nothing.
        digest = hash_key(key.strip())
        found = [caller for known, caller in self.callers.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise UnauthenticatedError("the API key is not known here")
        return found[0]


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def check_tenant(tenant: str) -> str:
    """Raises ValueError."""
    if not _TENANT.fullmatch(tenant):
        raise ValueError("a tenant is named by 1 to 40 of A-Z a-z 0-9 . _ -")
    return tenant


def read_line(text: str, number: int) -> KeyLine | None:
    """A line of a file of keys; None where it is empty or a comment.

    Raises:
        ValueError: it is neither, nor of the form; the message does not quote it, since it may be a key.
    """
    words = text.split()
    if not words or words[0].startswith("#"):
        return None
    found = _HASH.fullmatch(words[0])
    if found is None:
        raise ValueError(
            f"API keys, line {number}: a key stands here as its hash, {FORM}; a key in plain text becomes `sha256:` "
            "with what `printf %s KEY | sha256sum` prints, and `streamflow keys create TENANT` makes a new one"
        )
    try:
        return KeyLine(bytes.fromhex(found[1]), _read_caller(words[1:]))
    except ValueError as error:
        raise ValueError(f"API keys, line {number}: {error}; write {FORM}") from None


def _plain(number: float) -> str:
    """All 6 decimals that count, and never an exponent."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


def _read_caller(words: list[str]) -> Caller:
    if not words:
        raise ValueError("the tenant is missing")
    tenant, operator, given = check_tenant(words[0]), False, {}
    for word in words[1:]:
        name, _, value = word.partition("=")
        if word == "operator":
            operator = True
        elif name in ("jobs", "images-per-minute") and name not in given and _NUMBER.fullmatch(value):
            given[name] = value
        else:
            raise ValueError("behind the tenant may stand `operator`, `jobs=` and `images-per-minute=` with a number")
    jobs, per_minute = given.get("jobs"), given.get("images-per-minute")
    quota = Quota(None if jobs is None else int(jobs), None if per_minute is None else float(per_minute))
    return Caller(tenant, operator, quota)
