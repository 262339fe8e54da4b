"""How a process gets into Redis: address, user, password and certificates."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError

from streamflow.config import Settings
from streamflow.errors import InvalidRequestError

_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True, slots=True)
class RedisAccess:
    """What `redis_client.connect` needs.

    Attributes:
        url: redis://[USER[:PASSWORD]@]HOST:PORT/0, rediss:// for TLS, or unix:// for a socket.
        password_file: a file with the password, in place of one in the URL; read anew for every connection, so that a
            password can be exchanged under a running process.
        ca: authorities to trust (PEM), in place of the system's.
        cert, key: the client's certificate and its key (PEM), where the server asks for them.
        user: in place of one in the URL.
    """

    url: str = field(repr=False)
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str = ""

    @classmethod
    def of(cls, settings: Settings) -> RedisAccess:
        return cls(
            settings.redis_url,
            settings.redis_password_file,
            settings.redis_ca,
            settings.redis_cert,
            settings.redis_key,
            settings.redis_user,
        )

    @property
    def where(self) -> str:
        """The address without user and password, for messages."""
        try:
            parts = urlsplit(self.url)
        except ValueError:
            return self.url.rpartition("@")[2]
        return _host(parts) or parts.path

    def check(self) -> None:
        """Raises InvalidRequestError for what can be seen to be wrong without asking Redis; never with a password."""
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError:
            parts = None
        if parts is None or parts.scheme not in _SCHEMES:
            given = f"{parts.scheme}://{self.where}" if parts is not None and parts.scheme else self.where
            allowed = "redis://HOST:PORT/0 with a port of 1 to 65535, rediss:// for TLS, or unix:// for a socket"
            raise InvalidRequestError("redis_url", given, allowed)
        if parts.scheme != "unix" and not re.fullmatch(r"/?|/\d+", parts.path):
            # redis-py would take what is no number for 0.
            # A password with a slash ends up here.
            given = f"{parts.scheme}://{self.where}{parts.path.rpartition('@')[2]}"
            raise InvalidRequestError("redis_url", given, "a number of a database at its end, such as /0")
        if self.user and parts.username:
            raise InvalidRequestError("redis_user", self.user, "a user in the URL or here, not in both")
        if self.password_file is not None:
            if parts.password:
                raise InvalidRequestError(
                    "redis_password_file", self.password_file, "a password in the URL or in a file, not in both"
                )
            _password(self.password_file)
        if (self.ca or self.cert or self.key) and parts.scheme != "rediss":
            hint = "redis_ca, redis_cert and redis_key are for TLS"
            raise InvalidRequestError("redis_url", f"{parts.scheme}://{self.where}", "rediss://HOST:PORT/0", hint)
        if (self.cert is None) is not (self.key is None):
            raise InvalidRequestError(
                "redis_cert", self.cert, "together with redis_key, or neither for no client certificate"
            )
        self._check_certificates()

    def connection_options(self) -> tuple[str, dict[str, Any]]:
        """URL and options for redis-py."""
        options: dict[str, Any] = {}
        parts = urlsplit(self.url)
        if parts.scheme == "rediss":
            files = {"ssl_ca_certs": self.ca, "ssl_certfile": self.cert, "ssl_keyfile": self.key}
            options |= {name: str(path) for name, path in files.items() if path is not None}
            options |= {"ssl_check_hostname": True, "ssl_min_version": ssl.TLSVersion.TLSv1_2}
        if self.password_file is None:
            return self.url, options | ({"username": self.user} if self.user else {})
        options["credential_provider"] = _FromFile(self.user or unquote(parts.username or ""), self.password_file)
        # With a provider redis-py takes no user from the URL.
        return urlunsplit(parts._replace(netloc=_host(parts))), options

    def _check_certificates(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:
            raise InvalidRequestError("redis_ca", self.ca, "certificates in PEM form", _why(error)) from error
        try:
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                "redis_cert", self.cert, "a certificate in PEM form, with its key in redis_key", _why(error)
            ) from error


class _FromFile(CredentialProvider):
    """User and password, asked for by redis-py at every connection, and again as often as it tries to connect."""

    def __init__(self, user: str, path: Path) -> None:
        self._user, self._path = user, path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = _password(self._path)
        except InvalidRequestError as error:
            # It was there at the start, and is being exchanged: as if Redis were away for a moment.
            raise RedisConnectionError(str(error)) from error
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def _password(path: Path) -> str:
    try:
        password = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError("redis_password_file", path, "a file that can be read", _why(error)) from error
    if not password:
        raise InvalidRequestError("redis_password_file", path, "a file with a password", "it is empty")
    return password


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _why(error: Exception) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else "it is not text"
