"""API keys: which tenant a call belongs to."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streamflow.errors import UnauthenticatedError

_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,40}")


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys of a deployment, by the SHA-256 of each; without any, every call belongs to the tenant ""."""

    tenants: Mapping[bytes, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str) -> ApiKeys:
        """Reads `key tenant` lines; empty lines and lines that begin with # are skipped.

        Raises:
            ValueError: a line that is not of this form, or no key at all.
        """
        tenants: dict[bytes, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key, _, tenant = line.strip().partition(" ")
            if not _TENANT.fullmatch(tenant.strip()):
                raise ValueError(
                    f"API keys, line {number}: write `key tenant`, the tenant as 1 to 40 of A-Z a-z 0-9 . _ -"
                )
            tenants[_hash(key)] = tenant.strip()
        if not tenants:
            raise ValueError("API keys: the file has none; leave the setting out to ask for no keys")
        return cls(tenants)

    @classmethod
    def load(cls, path: Path | None) -> ApiKeys:
        """The keys of a file; none where there is no file to read."""
        return cls() if path is None else cls.parse(path.read_text("utf-8"))

    def tenant(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
        """Whose call this is, by its `authorization: Bearer <key>`.

        Raises:
            UnauthenticatedError: keys are asked for and this one is missing or unknown.
        """
        if not self.tenants:
            return ""
        headers = [value for key, value in metadata or () if key == "authorization"]
        scheme, _, key = str(headers[0]).partition(" ") if headers else ("", "", "")
        if scheme.lower() != "bearer" or not key:
            raise UnauthenticatedError(
                "this deployment asks for an API key: send the metadata `authorization: Bearer <key>`"
            )
        # Every key is compared, in constant time, so that the answer's delay tells nothing.
        digest = _hash(key.strip())
        found = [tenant for known, tenant in self.tenants.items() if hmac.compare_digest(known, digest)]
        if not found:
            raise UnauthenticatedError("the API key is not known here")
        return found[0]


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
