"""How a process gets into Redis: what is refused beforehand, and that no password shows."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
import redis.asyncio
import trustme

from streamflow.config import Settings
from streamflow.errors import InvalidRequestError, UnavailableError
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.redis_access import RedisAccess
from streamflow.transport.redis_client import connect
from streamflow.transport.redis_streams import RedisTransport
from tests.transport.worlds import redis_binary

SECRET = "correct-horse"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    certificate = trustme.CA().issue_cert("localhost")
    (tmp_path / "password").write_text(SECRET + "\n")
    (tmp_path / "empty").touch()
    (tmp_path / "cert.pem").write_bytes(certificate.cert_chain_pems[0].bytes())
    (tmp_path / "key.pem").write_bytes(certificate.private_key_pem.bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("url", "given", "said"),
    [
        ("redis://h:1/0", {"password_file": "nowhere"}, "redis_password_file"),
        ("redis://h:1/0", {"password_file": "empty"}, "it is empty"),
        (f"redis://u:{SECRET}@h:1/0", {"password_file": "password"}, "not in both"),
        (f"redis://u:{SECRET}@h:1/0", {"user": "another"}, "redis_user: got .*another.*not in both"),
        (f"redis://u:{SECRET}@h:1/0", {"ca": "cert.pem"}, "rediss://HOST"),
        (f"rediss://u:{SECRET}@h:1/0", {"ca": "nowhere"}, "redis_ca"),
        (f"rediss://u:{SECRET}@h:1/0", {"ca": "password"}, "redis_ca"),
        (f"rediss://u:{SECRET}@h:1/0", {"cert": "cert.pem"}, "together with redis_key"),
        (f"rediss://u:{SECRET}@h:1/0", {"cert": "cert.pem", "key": "password"}, "redis_cert"),
        (f"http://u:{SECRET}@h:1/0", {}, "redis_url: got 'http://h:1'"),
        (f"redis://u:{SECRET}@h:1/zero", {}, "redis_url: got 'redis://h:1/zero'; allowed: a number of a database"),
        (f"redis://u:/{SECRET}@h:1/0", {}, "redis_url: got"),
        (f"redis://:12/{SECRET}@h:1/0", {}, "redis_url: got"),
        (f"redis://u:{SECRET}@[bad", {}, r"redis_url: got '\[bad'"),
        (f"redis://u:{SECRET}@h:port/0", {}, "redis_url"),
        (f"x://u:{SECRET}@/path", {}, "redis_url: got 'x:///path'"),
    ],
)
def test_what_cannot_work_is_refused_without_telling_the_password(files, url, given, said):
    access = RedisAccess(url, **{name: value if name == "user" else files / value for name, value in given.items()})
    assert SECRET not in repr(access)
    with pytest.raises(InvalidRequestError, match=said) as caught:
        connect(access)
    assert SECRET not in str(caught.value)


def test_the_password_is_read_at_every_connection(files):
    access = RedisAccess("redis://enc%40der@h:1/0?protocol=2", files / "password")
    url, options = access.connection_options()
    assert url == "redis://h:1/0?protocol=2"
    provider = options["credential_provider"]
    assert provider.get_credentials() == ("enc@der", SECRET)
    (files / "password").write_text("another")
    assert provider.get_credentials() == ("enc@der", "another")
    assert RedisAccess("redis://h:1", files / "password").connection_options()[1][
        "credential_provider"
    ].get_credentials() == ("another",)


@pytest.mark.parametrize("broken", ["missing", "empty"])
async def test_a_password_file_that_is_away_for_a_moment_is_as_if_redis_were(tmp_path, broken):
    path = tmp_path / "password"
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as raw:
        address, secret = server.url.rpartition("@")[2], str(urlsplit(server.url).password)
        path.write_text(secret)
        transport = RedisTransport.from_url(RedisAccess(f"redis://{address}", path))
        await transport.ping()
        path.unlink()
        if broken == "empty":
            path.touch()
        raw.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(UnavailableError, match="redis_password_file") as caught:
            await transport.ping()
        assert caught.value.for_clients
        assert "password" not in caught.value.for_clients
        path.write_text(secret)
        await transport.ping()
        await transport.close()


async def test_whoever_is_not_let_in_is_told_that_redis_is_away():
    # Redis 7 breaks off a script's call, which is long for one who has not said who he is.
    with EmbeddedRedis(binary=redis_binary("7")) as server:
        # Without the PING that ours begins with, and that would be refused first.
        address = server.url.rpartition("@")[2]
        transport = RedisTransport(redis.asyncio.Redis.from_url(f"redis://{address}", protocol=2))
        for _ in range(3):
            with pytest.raises(UnavailableError, match="multibulk"):
                await transport.reap()
            with pytest.raises(UnavailableError):
                await transport.workers()
        await transport.close()


def test_the_user_need_not_be_in_the_url(files):
    with_file = RedisAccess("redis://h:1", files / "password", user="decoder").connection_options()
    assert with_file[1]["credential_provider"].get_credentials() == ("decoder", SECRET)
    # redis-py puts what the URL says over this.
    assert RedisAccess(f"redis://:{SECRET}@h:1", user="decoder").connection_options() == (
        f"redis://:{SECRET}@h:1",
        {"username": "decoder"},
    )


def test_settings_name_all_of_it(files):
    settings = Settings(
        redis_url="rediss://h:1/0",
        redis_user="decoder",
        redis_password_file=files / "password",
        redis_ca=files / "cert.pem",
        redis_cert=files / "cert.pem",
        redis_key=files / "key.pem",
    )
    access = RedisAccess.of(settings)
    access.check()
    options = access.connection_options()[1]
    assert options["ssl_check_hostname"] is True
    assert options["ssl_ca_certs"] == options["ssl_certfile"] == str(files / "cert.pem")
    assert options["ssl_keyfile"] == str(files / "key.pem")
    assert options["credential_provider"].get_credentials()[0] == "decoder"
