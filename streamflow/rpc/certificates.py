"""TLS of servers: certificates that are read again when they change, and probes that know their own server."""

from __future__ import annotations

import ssl
from pathlib import Path
from socket import create_connection
from threading import Lock
from typing import Any

import grpc

from streamflow.errors import InvalidRequestError
from streamflow.rpc.channels import Target
from streamflow.telemetry import get_logger

_HANDSHAKE_S = 3.0

_log = get_logger(__name__)


class CertificateFiles:
    """A certificate chain and its key as files have them at the moment: connections that begin later get new ones.

    New files that cannot be used, or do not belong together, are told of in the log, and those of before stay.

    Args:
        cert, key: PEM.

    Raises:
        InvalidRequestError: they cannot be used at the start.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._lock = Lock()
        self._told = ""
        try:
            self._seen = self._versions()
            self._first = self._load()
        except (OSError, ValueError) as error:
            raise InvalidRequestError("tls_cert", cert, "a PEM file, with its key in tls_key", _why(error)) from error

    def credentials(self) -> grpc.ServerCredentials:
        configuration = grpc.ssl_server_certificate_configuration([self._first])
        # None = nothing has changed, as gRPC documents and its stubs do not say.
        return grpc.dynamic_ssl_server_credentials(configuration, self._newer)  # type: ignore[arg-type]

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at every connection, from threads of its own; None = nothing has changed."""
        with self._lock:
            try:
                versions = self._versions()
                if versions == self._seen:
                    return None
                pair = self._load()
                if versions != self._versions():
                    return None  # they are being written: again at the next connection
            except (OSError, ValueError) as error:
                self._refuse(error)
                return None
            self._seen, self._told = versions, ""
        _log.info("certificate read again")
        return grpc.ssl_server_certificate_configuration([pair])

    def _refuse(self, error: OSError | ValueError) -> None:
        """Told of once, and tried again at every connection: what cannot be read now may be read later."""
        if _why(error) != self._told:
            _log.error("certificate cannot be read; the one of before stays in force", reason=_why(error))
        self._told = _why(error)

    def _versions(self) -> list[tuple[int, int, int]]:
        return [(one.st_mtime_ns, one.st_size, one.st_ino) for one in (self._cert.stat(), self._key.stat())]

    def _load(self) -> tuple[bytes, bytes]:
        # gRPC would take what does not belong together, and then fail every handshake.
        # An empty passphrase, since nobody is there to be asked for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key, password=str)
        return self._key.read_bytes(), self._cert.read_bytes()


def certificate_files(cert: Path | None, key: Path | None) -> CertificateFiles | None:
    """None where neither is given.

    Raises:
        InvalidRequestError: one without the other, or see CertificateFiles.
    """
    if cert is not None and key is not None:
        return CertificateFiles(cert, key)
    if cert is not None or key is not None:
        name, given = ("tls_cert", cert) if key is None else ("tls_key", key)
        raise InvalidRequestError(name, given, "tls_cert and tls_key together, or neither for no TLS")
    return None


def probe_target(address: str, cert: Path | None) -> Target:
    """How to probe one's own server on this machine.

    It is asked for under any name that its certificate has: a probe calls 127.0.0.1, which certificates rarely name.
    The certificate must be the one of the file.

    Blocks for a handshake.

    Args:
        cert: the server's certificate; None, or one of which the server knows nothing, = it is asked without TLS.
    """
    name = None if cert is None else _own_name(address, cert)
    if cert is None or name is None:
        return Target(address)
    return Target(address, root_ca=cert.read_bytes(), server_name=name)


def _why(error: OSError | ValueError) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else str(error)


def _own_name(address: str, cert: Path) -> str | None:
    """A name in the server's certificate; None where it has another certificate, or none at all."""
    host, _, port = address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is what is trusted
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cert)
        with (
            create_connection((host.strip("[]"), int(port)), timeout=_HANDSHAKE_S) as connection,
            context.wrap_socket(connection) as secured,
        ):
            names: Any = (secured.getpeercert() or {}).get("subjectAltName", ())
    except OSError:
        return None
    return next((str(name).replace("*", "probe") for kind, name in names if kind in ("DNS", "IP Address")), None)
