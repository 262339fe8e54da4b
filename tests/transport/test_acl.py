"""Users with the least rights: what the sources call is what they may, and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from streamflow.cli.app import app
from streamflow.errors import UnavailableError
from streamflow.transport.acl import RIGHTS
from streamflow.transport.base import Transport
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.redis_streams import RedisTransport
from tests.transport.acl_worlds import make_users
from tests.transport.lua_calls import commands_of
from tests.transport.worlds import new_job, redis_binary

STAGES = {"read", "ended_jobs", "spec", "advance", "finish", "heartbeat", "hand_back", "register", "unregister"}
STAGES |= {"cancel", "backlog", "ping", "get_blob", "lease_gpu", "free_gpu"}
METHODS = {
    "gateway": {"admit", "look", "job", "jobs", "result", "mark_delivered", "cancel", "renew_watch", "queue_position"}
    | {"expected_s", "subscribe", "reap", "take_ended", "dead_letters", "remove_dead_letter", "get_blob", "workers"}
    | {"backlog", "overview", "ping"},
    "encoder": STAGES | {"job", "put_blob", "get_cached", "put_cached"},
    "denoiser": STAGES | {"put_blob", "get_cached", "publish", "push_preview"},
    "decoder": STAGES | {"pop_preview", "publish"},
}
"""What of the transport each kind of process uses."""

# Of every connection, and what `EVALSHA` falls back to.
CONNECTION = {"ping", "subscribe", "unsubscribe", "evalsha", "eval"}
_COMMAND = re.compile(r"[A-Z]{3,}")
# Options of commands, which look like commands.
_OPTIONS = {"COUNT", "BLOCK", "STREAMS", "MAXLEN", "WITHSCORES", "LIMIT", "CANCELLED"}


def commands_of_method(name: str) -> set[str]:
    """Those that a method of RedisTransport sends, and those of the scripts that it runs."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(RedisTransport, name))))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _COMMAND.fullmatch(node.value) and node.value not in _OPTIONS:
                found.add(node.value.lower())
        elif isinstance(node, ast.Attribute):
            if node.attr == "hgetall":
                found.add("hgetall")
            elif isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in _HELPERS:
                found |= commands_of_method(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "script":
            assert isinstance(node.args[0], ast.Constant)
            found |= commands_of(node.args[0].value)
    return found


_HELPERS = ("_admit", "_places", "_views", "_take", "_more")


def calls_of_transport(*places: str) -> set[str]:
    """Methods of a transport that the code in these folders and files calls."""
    methods = {name for name in vars(Transport) if not name.startswith("_")}
    root, found = Path(__file__).parent.parent.parent, set()
    for place in places:
        paths = [root / place] if place.endswith(".py") else sorted((root / place).rglob("*.py"))
        assert paths
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in methods and "transport" in ast.unparse(node.value):
                    found.add(node.attr)
    # The others send nothing.
    return found - {"close", "lease_s", "put_down"}


SHARED = ("streamflow/transport/worker.py", "streamflow/host/control.py", "streamflow/host/process.py")


def test_the_methods_of_every_kind_of_process_are_those_that_its_code_calls():
    assert calls_of_transport("gateway") == METHODS["gateway"]
    for role in ("encoder", "denoiser", "decoder"):
        assert calls_of_transport(f"services/{role}", *SHARED) <= METHODS[role]
    # What all stages share of the host's code not all of them use.
    assert calls_of_transport("services", "streamflow/host", *SHARED) == (
        METHODS["encoder"] | METHODS["denoiser"] | METHODS["decoder"]
    )


@pytest.mark.parametrize("role", RIGHTS)
def test_every_kind_of_process_may_run_what_it_runs_and_nothing_else(role):
    used = CONNECTION.union(*map(commands_of_method, METHODS[role]))
    assert RIGHTS[role].commands == used


@pytest.fixture(params=["6.2", "7"])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(binary=redis_binary(request.param)) as server:
        yield server


OWN, OTHER = "sf:v1:{mine}:", "sf:v1:{theirs}:"
FORBIDDEN = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("ACL", "LIST"),
    ("ACL", "WHOAMI"),
    ("CLIENT", "LIST"),
    ("DEBUG", "SLEEP", "0"),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("MONITOR",),
    ("SCRIPT", "FLUSH"),
    ("SELECT", "1"),
    ("XGROUP", "DESTROY", OWN + "encode", "workers"),
    ("XINFO", "STREAM", OWN + "encode"),
    ("GET", OTHER + "res:a:0"),
    ("HGETALL", OTHER + "job:a"),
    ("XRANGE", OTHER + "encode", "-", "+"),
    ("HDEL", OTHER + "meta", "_"),
    ("SET", "anything", "x"),
    ("GET", OWN + "unheard-of"),
    ("PUBLISH", OTHER + "ev:a", "x"),
    ("PUBLISH", OWN + "another", "x"),
    ("SUBSCRIBE", OTHER + "ev:a"),
    ("PSUBSCRIBE", "*"),
    ("EVAL", "return redis.call('FLUSHALL')", "0"),
    ("EVAL", "return redis.call('KEYS', '*')", "0"),
    ("EVAL", f"return redis.call('GET', '{OTHER}res:a:0')", "0"),
    ("EVAL", "return 1", "1", OTHER + "meta"),
]
OF_OTHERS = [
    ("gateway", ("XREADGROUP", "GROUP", "workers", "w", "STREAMS", OWN + "encode", ">")),
    ("gateway", ("XCLAIM", OWN + "encode", "workers", "w", "0", "1-0")),
    ("gateway", ("XRANGE", OWN + "preview", "-", "+")),
    ("encoder", ("ZREVRANGEBYSCORE", OWN + "jobs:alice", "+inf", "-inf")),
    ("encoder", ("XREVRANGE", OWN + "dead", "+", "-")),
    ("encoder", ("XADD", OWN + "preview", "*", "a", "b")),
    ("denoiser", ("HGETALL", OWN + "job:a")),
    ("denoiser", ("ZADD", OWN + "jobs:alice", "1", "a")),
    ("decoder", ("GET", OWN + "cached:a")),
    ("decoder", ("SET", OWN + "cached:a", "poison")),
    ("decoder", ("DEL", OWN + "res:a:0")),
]


def refused(client: redis.Redis, command: tuple[str, ...]) -> bool:
    try:
        client.execute_command(*command)
    except redis.ResponseError as error:
        return any(
            word in str(error).lower()
            for word in ("noperm", "permission", "user executing", "can't access", "not allowed")
        )
    return False


def test_they_may_do_nothing_else(server):
    urls = make_users(server, "mine")
    for role, url in urls.items():
        with redis.Redis.from_url(url) as client:
            assert client.ping()
            allowed = [command for command in FORBIDDEN if not refused(client, command)]
            assert allowed == [], role
    for role, command in OF_OTHERS:
        with redis.Redis.from_url(urls[role]) as client:
            assert refused(client, command), (role, command)


async def test_a_process_with_the_wrong_user_says_what_to_do(server):
    # As when the deployment was given another name than the users were made for.
    transport = RedisTransport.from_url(make_users(server, "mine")["gateway"], deployment="another")
    for call in (transport.ping(), transport.admit(new_job()), transport.job("a")):
        with pytest.raises(UnavailableError, match="streamflow redis-acl"):
            await call
    await transport.close()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["redis-acl", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_what_redis_reads(tmp_path, server):
    secrets = tmp_path / "secrets"
    shown = run("--deployment", "mine", "--more-model", "rings", "--dir", str(secrets))
    text = (secrets / "users.acl").read_text()
    passwords = {path.stem: path.read_text() for path in secrets.glob("*.password")}
    names = {f"mine-{role}" for role in RIGHTS} | {f"mine-rings-{role}" for role in RIGHTS if role != "gateway"}
    assert set(passwords) == names | {"administrator"}
    assert all(name in shown for name in passwords)
    assert not any(password in text + shown for password in passwords.values())
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in secrets.glob("*.password"))
    # Once more: passwords stay, and those that were taken away are new.
    (secrets / "mine-decoder.password").unlink()
    run("--deployment", "mine", "--more-model", "rings", "--dir", str(secrets))
    now = {path.stem: path.read_text() for path in secrets.glob("*.password")}
    assert {name for name in now if now[name] != passwords[name]} == {"mine-decoder"}
    with redis.Redis.from_url(server.url) as raw:
        # The default user's is the first, and turns off who is asking.
        for line in reversed((secrets / "users.acl").read_text().splitlines()):
            _, name, *rules = line.split()
            raw.execute_command("ACL", "SETUSER", name, *rules)
    address = server.url.rpartition("@")[2]
    with redis.Redis.from_url(f"redis://{address}") as stranger, pytest.raises(redis.ConnectionError):
        stranger.ping()
    for name, password in now.items():
        with redis.Redis.from_url(f"redis://{name}:{password}@{address}") as client:
            assert client.ping()
    # The gateway of both models.
    with redis.Redis.from_url(f"redis://mine-gateway:{now['mine-gateway']}@{address}") as client:
        assert client.hgetall("sf:v1:{mine}:job:a") == client.hgetall("sf:v1:{mine-rings}:job:a") == {}
        assert refused(client, ("HGETALL", "sf:v1:{mine-other}:job:a"))


def test_the_command_names_the_users_that_it_keeps(tmp_path):
    run("--deployment", "a", "--dir", str(tmp_path))
    for options, named in (([], True), (["--only"], False)):
        result = CliRunner().invoke(app, ["redis-acl", "--deployment", "b", "--dir", str(tmp_path), *options])
        assert ("a-gateway, a-encoder, a-denoiser, a-decoder" in result.stderr) == named
        assert (" a-decoder " in (tmp_path / "users.acl").read_text()) == named


def test_the_command_refuses_a_name_that_no_deployment_can_have(tmp_path):
    for name, folder in (("a b", tmp_path), ("../a", tmp_path), ("a", tmp_path / "file" / "folder")):
        (tmp_path / "file").touch()
        result = CliRunner().invoke(app, ["redis-acl", "--deployment", name, "--dir", str(folder)])
        assert result.exit_code == 2
        assert "deployment: got" in result.stderr or "dir: got" in result.stderr
        assert not list(tmp_path.rglob("*.password"))


@pytest.mark.parametrize("text", ["", "\n", "short\n"])
def test_the_command_refuses_a_password_that_is_none(tmp_path, text):
    run("--dir", str(tmp_path))
    before = (tmp_path / "users.acl").read_text()
    (tmp_path / "administrator.password").write_text(text)
    result = CliRunner().invoke(app, ["redis-acl", "--dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "administrator.password'; allowed: a file with 16 characters" in " ".join(result.stderr.split())
    assert (tmp_path / "users.acl").read_text() == before
