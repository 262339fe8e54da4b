"""A client's own arguments are refused before anything is sent, with what was given and what is allowed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from streamflow import Client, InvalidRequestError
from streamflow.client.arguments import check_address, check_timeout_s

NOWHERE = "127.0.0.1:1"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "localhost:1",
        "[::1]:65535",
        "dns:///gateway:50051",
        "dns:50051",
        "unix:/run/gateway",
        "ipv6:[::1]:1",
    ],
)
def test_addresses_that_grpc_resolves(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:99999", "ports are 1 to 65535"),
        ("127.0.0.1:0", "ports are 1 to 65535"),
        ("http://gateway:50051", "without a scheme"),
        ("http://[::1:50051", "without a scheme"),
        ("gateway:" + "9" * 5000, "host:port"),
        ("a\x00b:1", "host:port"),
        ("g\udcff:1", "host:port"),
        ("[]:1", "host:port"),
        ("gateway", "with its port: gateway:50051"),
        ("::1:50051", r"\[::1\]:50051"),
        ("two words:1", "host:port"),
        ("", "host:port"),
        (None, "host:port"),
        (b"gateway:1", "host:port"),
    ],
)
def test_addresses_that_lead_nowhere(address: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        Client(address)
    assert refused.value.field == "address"


def test_times_of_any_kind_of_number() -> None:
    for seconds in (5, 0.5, np.float32(5), np.int64(5), Fraction(1, 2)):
        assert check_timeout_s(seconds) == seconds


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 10**400, 8e9, "5", True, None])
def test_times_that_are_none(seconds: Any) -> None:
    for name in ("timeout_s", "connect_timeout_s"):
        with pytest.raises(InvalidRequestError, match=f"{name}: got"):
            Client(NOWHERE, **{name: seconds})
    if seconds is not None:  # which stands for the client's own
        with Client(NOWHERE) as client:
            for call in (client.generate, client.submit):
                with pytest.raises(InvalidRequestError, match="timeout_s"):
                    call("a ring", timeout_s=seconds)


def test_certificates_that_are_none(tmp_path: Path) -> None:
    """An empty one, too: without it the connection would not be encrypted."""
    hostname, empty = tmp_path / "text", tmp_path / "empty"
    hostname.write_text("gateway\n")
    empty.touch()
    for tls in (hostname, str(hostname), empty, tmp_path / "nowhere", tmp_path, b"", b"\xff", b"gateway"):
        with pytest.raises(InvalidRequestError, match="tls: got"):
            Client(NOWHERE, tls=tls)
    pem = trustme.CA().cert_pem.bytes()
    for authorities in (pem, "# Főtanúsítvány\n".encode() + pem):
        assert "TLS" in repr(Client(NOWHERE, tls=authorities))


@pytest.mark.parametrize("key", ["one\ntwo", "clé", "tab\t", 5])
def test_a_key_that_cannot_be_sent_is_not_told(key: Any) -> None:
    with pytest.raises(InvalidRequestError, match="printable ASCII") as refused:
        Client(NOWHERE, api_key=key)
    assert str(key) not in str(refused.value)


@pytest.mark.parametrize("given", [3, b"id", "\udcff"])
def test_ids_are_text(given: Any) -> None:
    with Client(NOWHERE) as client:
        for call in (client.job, client.cancel, client.retry, lambda given: next(client.watch(given))):
            with pytest.raises(InvalidRequestError, match=r"id: got .*; allowed: a string"):
                call(given)
        with pytest.raises(InvalidRequestError, match=r"request_id: got .*; allowed: a string"):
            client.generate("a ring", request_id=given)
