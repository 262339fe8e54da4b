"""What to do about a connection that cannot be made, as far as gRPC's own words tell."""

from __future__ import annotations

_NOT_TRUSTED = (
    "its certificate is not signed by an authority that this client trusts: give the one that signed it "
    "(tls=PATH of the client, --tls-ca of the commands)"
)
_OTHER_NAME = "its certificate is for another name: call the gateway by a name that the certificate has"
_NOT_ENCRYPTED = "it does not speak TLS: check the port, or leave TLS out (tls, --tls, --tls-ca)"
_MAY_ENCRYPT = "if it encrypts, turn TLS on (tls=True or PATH of the client, --tls or --tls-ca of the commands)"

# In the words of gRPC and of BoringSSL.
_HINTS = {
    "CERTIFICATE_VERIFY_FAILED": _NOT_TRUSTED,
    "Hostname Verification Check failed": _OTHER_NAME,
    "WRONG_VERSION_NUMBER": _NOT_ENCRYPTED,
}


def hint(message: str, *, tls: bool) -> str:
    """Args: message: of gRPC; tls: whether the client encrypts. Empty where it tells nothing."""
    found = next((found for words, found in _HINTS.items() if words in message), "")
    # What a server that wants TLS does with anything else is to hang up.
    return _MAY_ENCRYPT if not tls and "Socket closed" in message else found
