"""Ports are free on every address of a name, or refused."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamflow import ports


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that stands for two addresses, whatever this machine's IPv6 is like."""

    def resolve(host: str, port: int, **_: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(ports.socket, "getaddrinfo", resolve)
    return "two.example"


@pytest.fixture
def stranger() -> Iterator[int]:
    with socket.create_server(("127.0.0.2", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_another_process_holds_on_one_address_is_not_free(two_addresses: str, stranger: int) -> None:
    with pytest.raises(OSError, match="in use"):
        ports.require_free(two_addresses, stranger)


def test_a_free_port_is_free_on_every_address(
    two_addresses: str, stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = iter([stranger, *(others := range(20_000, 20_050))])
    monkeypatch.setattr(ports._RANDOM, "choice", lambda _: next(tried))
    assert ports.local_addresses(two_addresses) == ["127.0.0.1", "127.0.0.2"]
    assert ports.free_port(two_addresses) in others


def test_a_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_ports", lambda: range(20_050, 20_060))
    given = [ports.free_port() for _ in range(3)]
    assert len(set(given)) == 3


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("32768\t60999\n", range(20_768, 32_768)),
        ("10000 65535", range(1024, 10_000)),
        ("1024 65535", range(20_768, 32_768)),
        ("", range(20_768, 32_768)),
    ],
)
def test_a_free_port_is_none_that_the_system_gives_to_connections(
    said: str, expected: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "range"
    file.write_text(said)
    monkeypatch.setattr(ports, "_RANGE", file)
    assert ports._ports() == expected
    assert ports.free_port() in expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_names_become_the_addresses_of_this_machine(host: str) -> None:
    assert all(address[0].isdigit() or ":" in address for address in ports.local_addresses(host))
    assert 0 < ports.free_port(host) < 65536


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-name.invalid"])
def test_what_is_not_an_address_of_this_machine_is_refused(host: str) -> None:
    with pytest.raises(OSError, match=r".+"):
        ports.require_free(host, 0)


def test_addresses_are_joined_as_urls_want_them() -> None:
    assert ports.join("::1", 80) == ports.join("[::1]", 80) == "[::1]:80"
    assert ports.join("localhost", 80) == "localhost:80"
