"""API keys: what a file may say, and how it changes under a running server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow.errors import InvalidRequestError, UnauthenticatedError
from streamflow.rpc.auth import ANYBODY, MOST, ApiKeys, Caller, KeyLine, hash_key, read_line
from streamflow.rpc.channels import key_metadata
from streamflow.rpc.key_file import KeyFile
from streamflow.types import Quota
from tests.keys import api_keys, key_lines
from tests.rpc.conftest import no_more_files

A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


def caller(keys: ApiKeys | KeyFile, key: str) -> Caller:
    return keys.caller(key_metadata(key))


def test_keys_name_their_caller_and_never_show():
    keys = api_keys("key-one alice\nkey-two bob operator jobs=3 images-per-minute=0.5\n")
    assert caller(keys, "key-one") == Caller("alice")
    assert caller(keys, "key-two") == Caller("bob", True, Quota(3, 0.5))
    assert ApiKeys().caller(()) == ANYBODY
    for shown in (repr(keys), str(keys)):
        assert "key-one" not in shown
        assert hash_key("key-one").hex() not in shown


def test_a_tenant_may_have_two_keys_at_once():
    keys = api_keys("old alice jobs=2\nnew alice jobs=2\n")
    assert caller(keys, "old") == caller(keys, "new") == Caller("alice", quota=Quota(jobs=2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has none"),
        ("# none\n", "has none"),
        ("secret alice", "sha256sum"),
        (f"{'a' * 64} alice", "sha256sum"),
        ("sha256:abc alice", "sha256sum"),
        (A, "tenant is missing"),
        (f"{A} bad/tenant", "1 to 40"),
        (f"{A} {'t' * 41}", "1 to 40"),
        (f"{A} alice bob", "operator"),
        (f"{A} alice jobs=-1", "with a number"),
        (f"{A} alice jobs=two", "with a number"),
        (f"{A} alice images-per-minute=nan", "with a number"),
        (f"{A} alice jobs=1.5", "jobs"),
        (f"{A} alice jobs=1 jobs=2", "jobs"),
        (f"{A} alice jobs=1\n{B} alice jobs=2", "line 2"),
        (f"{A} alice operator\n{B} alice", "line 2"),
        (f"{A} alice\n{A.upper().replace('SHA', 'sha')} bob", "line 2: the key aaaaaaaaaaaa stands there twice"),
        (f"{A} alice\n{A} alice", "line 2: the key aaaaaaaaaaaa stands there twice"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_tells_no_key(text, said):
    with pytest.raises(ValueError, match=said) as caught:
        ApiKeys.parse(text)
    assert "API keys" in str(caught.value)
    assert "secret" not in str(caught.value)


@settings(deadline=None)
@given(
    st.binary(min_size=32, max_size=32),
    st.from_regex(r"[A-Za-z0-9_.-]{1,40}", fullmatch=True),
    st.booleans(),
    st.none() | st.integers(0, MOST),
    st.none() | st.integers(0, MOST * 10**6).map(lambda millionths: millionths / 10**6),
)
def test_a_line_reads_as_it_was_written(digest, tenant, operator, jobs, per_minute):
    line = KeyLine(digest, Caller(tenant, operator, Quota(jobs, per_minute)))
    assert read_line(str(line), 1) == line


@asynccontextmanager
async def followed(path: Path) -> AsyncIterator[KeyFile]:
    async with KeyFile(path, look_every_s=0.01) as keys:
        yield keys


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def knows(keys: KeyFile, key: str) -> bool:
    try:
        return bool(caller(keys, key))
    except UnauthenticatedError:
        return False


async def test_keys_come_and_go_without_a_restart(tmp_path):
    path = tmp_path / "keys"
    path.write_text(key_lines("old alice\n"))
    async with followed(path) as keys:
        path.write_text(key_lines("old alice\nnew alice\n"))
        await until(lambda: knows(keys, "new"))
        assert knows(keys, "old")
        # As an editor does it, and Kubernetes: another file under the same name.
        (tmp_path / "other").write_text(key_lines("new alice\nnewer bob\n"))
        os.replace(tmp_path / "other", path)
        await until(lambda: knows(keys, "newer"))
        assert not knows(keys, "old")


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.message for one in caplog.records if one.levelname == "ERROR"]


@pytest.mark.parametrize("broken", ["secret alice\n", "", "\xff\xfe", None], ids=["plain", "empty", "no text", "gone"])
async def test_a_broken_file_is_refused_loudly_and_the_old_keys_stay(tmp_path, caplog, broken):
    path = tmp_path / "keys"
    path.write_text(key_lines("old alice\n"))
    async with followed(path) as keys:
        if broken is None:
            path.unlink()
        else:
            path.write_bytes(broken.encode("latin-1"))
        await until(lambda: bool(errors(caplog)))
        # Time for some more looks: it is told once, not every second.
        await asyncio.sleep(0.1)
        [message] = errors(caplog)
        assert "stay in force" in message
        assert knows(keys, "old")
        path.write_text(key_lines("new alice\n"))
        await until(lambda: knows(keys, "new"))
    assert "secret" not in caplog.text


async def test_a_file_that_cannot_be_read_for_a_moment_is_read_again(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(key_lines("old alice\n"))
    async with followed(path) as keys:
        path.write_text(key_lines("new alice\n"))
        with no_more_files():
            await until(lambda: bool(errors(caplog)))
            await asyncio.sleep(0.1)
            assert knows(keys, "old")
        await until(lambda: knows(keys, "new"))
        assert not knows(keys, "old")
        assert len(errors(caplog)) == 1


@pytest.mark.parametrize("content", [None, "secret alice\n", ""])
def test_a_file_that_cannot_be_used_at_the_start_is_refused(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequestError, match="api_keys_file") as caught:
        KeyFile(path)
    assert "secret" not in str(caught.value)


async def test_without_a_file_no_keys_are_asked_for():
    async with KeyFile(None) as keys:
        assert keys.caller(()) == ANYBODY
