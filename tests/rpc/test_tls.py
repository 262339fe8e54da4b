"""TLS between clients and gateways, with certificates of this test's own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import trustme
from typer.testing import CliRunner

from streamflow.cli.app import app
from streamflow.client import AsyncClient, Client
from streamflow.config import child_environment
from streamflow.errors import InvalidRequestError, UnavailableError
from streamflow.rpc.certificates import CertificateFiles, probe_target
from streamflow.rpc.channels import Target, open_aio_channel
from streamflow.rpc.probe import is_ready
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc
from tests.rpc.conftest import no_more_files

pytestmark = pytest.mark.timeout(60)
NAME = "streamflow.v1.Gateway"


class Authority:
    """Issues certificates into one pair of files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca = folder, trustme.CA()
        self.cert, self.key, self.root = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.root)

    def issue(self, *names: str) -> None:
        issued = self.ca.issue_cert(*names)
        issued.private_key_pem.write_to_path(self.key)
        self.cert.write_bytes(b"".join(one.bytes() for one in issued.cert_chain_pems))

    def files(self) -> CertificateFiles:
        return CertificateFiles(self.cert, self.key)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = Authority(tmp_path)
    authority.issue("localhost", "127.0.0.1")
    return authority


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """An authority that signed nothing here."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "stranger.pem")
    return tmp_path / "stranger.pem"


async def job(client: AsyncClient) -> str:
    async with client:
        return (await client.job("x")).request_id


@pytest.fixture
def secure(serve: Callable[..., Any], authority: Authority) -> Callable[[], Any]:
    return lambda: serve(credentials=authority.files().credentials())


async def test_the_right_authority_is_trusted_by_both_clients_and_the_commands(secure, authority):
    async with secure() as (server, _):
        assert await job(AsyncClient(server.address, tls=authority.root)) == "x"
        assert await job(AsyncClient(server.address, tls=authority.root.read_bytes())) == "x"

        def blocking() -> str:
            with Client(server.address, tls=authority.root) as client:
                return client.job("x").request_id

        assert await asyncio.to_thread(blocking) == "x"
        command = ["cancel", "x", "--address", server.address, "--tls-ca", str(authority.root)]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        # The server of this test has no such call, which it says in a way that only a connection can.
        assert "unimplemented" in result.stderr.lower()


@pytest.mark.parametrize("case", ["wrong authority", "the system's", "plain text", "another name", "TLS to plain text"])
async def test_what_is_wrong_with_a_connection_is_said_with_what_to_do(secure, serve, authority, stranger, case):
    tls, said = {
        "wrong authority": (stranger, "give the one that signed it"),
        "the system's": (True, "give the one that signed it"),
        "plain text": (False, "turn TLS on"),
        "another name": (authority.root, "a name that the certificate has"),
        "TLS to plain text": (authority.root, "does not speak TLS"),
    }[case]
    if case == "another name":
        authority.issue("gateway.example.org")
    async with serve() if case == "TLS to plain text" else secure() as (server, _):
        # By its number: "localhost" may have two addresses, and gRPC tells of one.
        address = f"127.0.0.1:{server.port}"
        with pytest.raises(UnavailableError, match=said):
            await job(AsyncClient(address, tls=tls, connect_timeout_s=0.5))


async def test_a_certificate_is_exchanged_under_a_running_server(secure, authority, caplog):
    async with secure() as (server, _):
        before = authority.cert.read_bytes()
        authority.issue("localhost", "another.example.org")
        # Under the new certificate alone.
        target = Target(server.address, root_ca=authority.root.read_bytes(), server_name="another.example.org")
        async with open_aio_channel(target) as channel:
            stub = gateway_pb2_grpc.GatewayStub(channel)
            assert (await stub.GetJob(gateway_pb2.GetJobRequest(request_id="x"))).request_id == "x"
        # What cannot be used is refused loudly, and the one of before serves on.
        authority.cert.write_bytes(before)
        assert await job(AsyncClient(server.address, tls=authority.root)) == "x"
        assert [one.levelname for one in caplog.records if "before stays" in one.message] == ["ERROR"]


def test_a_certificate_that_cannot_be_read_for_a_moment_is_read_again(authority, caplog):
    files = authority.files()
    authority.issue("localhost")
    with no_more_files():
        assert [files._newer() for _ in range(3)] == [None] * 3
    assert files._newer() is not None
    assert files._newer() is None
    assert [one.levelname for one in caplog.records if "before stays" in one.message] == ["ERROR"]


@pytest.mark.parametrize("broken", ["key of another", "no certificate", "missing"])
def test_files_that_cannot_be_used_are_refused_at_the_start(authority, broken):
    match broken:
        case "key of another":
            trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(authority.key)
        case "no certificate":
            authority.cert.write_text("nothing")
        case "missing":
            authority.key.unlink()
    with pytest.raises(InvalidRequestError, match="tls_cert"):
        authority.files()


@pytest.mark.parametrize(
    "names", [("localhost",), ("gateway.example.org", "localhost"), ("*.example.org",), ("10.1.2.3",)]
)
async def test_a_probe_knows_its_own_server_whatever_its_certificate_names(secure, authority, names):
    authority.issue(*names)
    async with secure() as (server, _):
        address = f"127.0.0.1:{server.port}"
        assert await asyncio.to_thread(is_ready, address, tls_cert=authority.cert)
        assert not await asyncio.to_thread(is_ready, address, NAME, tls_cert=authority.cert)
        await server.set_ready(True)
        assert await asyncio.to_thread(is_ready, address, NAME, tls_cert=authority.cert)


async def test_a_probe_is_not_taken_in_by_another_server(secure, authority, tmp_path):
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    other.issue("localhost")
    async with secure() as (server, _):
        assert not await asyncio.to_thread(is_ready, server.address, tls_cert=other.cert)
        assert not await asyncio.to_thread(is_ready, server.address)


async def test_a_probe_asks_a_server_without_tls_plainly(serve, authority):
    async with serve() as (server, _):
        assert await asyncio.to_thread(probe_target, server.address, authority.cert) == Target(server.address)
        assert await asyncio.to_thread(is_ready, server.address, tls_cert=authority.cert)
    assert not is_ready(server.address, tls_cert=authority.cert)


async def test_the_probe_of_a_container_reads_what_its_gateway_reads(secure, authority):
    async with secure() as (server, _):
        command = [sys.executable, "-m", "streamflow.rpc.probe", server.address]
        for settings, code in (({"tls_cert": authority.cert}, 0), ({"tls_cert": ""}, 1)):
            environment = child_environment(settings)
            ended = await asyncio.to_thread(subprocess.run, command, env=environment, timeout=30, check=False)
            assert ended.returncode == code


async def test_the_key_is_not_shown(authority):
    assert "PRIVATE" not in repr(authority.files())
    assert isinstance(authority.files().credentials(), grpc.ServerCredentials)
