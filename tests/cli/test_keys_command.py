"""`streamflow keys` on files, and what servers read in them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from streamflow.cli.app import app
from streamflow.cli.key_lines import alone, read, remove, write
from streamflow.rpc.auth import ApiKeys, Caller
from streamflow.rpc.channels import key_metadata
from streamflow.types import Quota


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMFLOW_API_KEYS_FILE", str(tmp_path / "keys.txt"))
    return tmp_path / "keys.txt"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def created(*arguments: str) -> str:
    result = run("create", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def caller(file: Path, key: str) -> Caller:
    return ApiKeys.parse(file.read_text()).caller(key_metadata(key))


@pytest.mark.parametrize("command", ["create", "list", "revoke"])
def test_every_command_teaches_by_examples(command: str) -> None:
    assert f"streamflow keys {command}" in run(command, "--help").output.split("Examples:")[1]


def test_a_key_is_shown_once_and_only_its_hash_is_kept(file: Path) -> None:
    key = created("alice")
    assert key.startswith("sf_")
    assert len(key) > 40
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert caller(file, key) == Caller("alice")


def test_the_second_key_has_what_the_first_has_and_an_option_holds_for_both(file: Path) -> None:
    first = created("alice", "--jobs", "4", "--images-per-minute", "30")
    other, second = created("bob"), created("alice")
    assert caller(file, first) == caller(file, second) == Caller("alice", quota=Quota(4, 30.0))
    third = created("alice", "--jobs", "2", "--operator")
    for key in (first, second, third):
        assert caller(file, key) == Caller("alice", True, Quota(2, 30.0))
    assert caller(file, other) == Caller("bob")


def test_list_shows_ids_and_revoke_takes_them(file: Path) -> None:
    first, second = created("alice", "--jobs", "4"), created("ops", "--operator")
    file.write_text("# who gets what: ask the platform team\n" + file.read_text())
    listed = json.loads(run("list", "--json").stdout)
    assert [(one["tenant"], one["operator"], one["jobs"]) for one in listed] == [
        ("alice", False, 4),
        ("ops", True, None),
    ]
    assert all(one["id"] in run("list").stdout for one in listed)
    assert run("revoke", listed[0]["id"]).exit_code == 0
    assert file.read_text().startswith("# who gets what")
    assert caller(file, second).operator
    with pytest.raises(Exception, match="not known"):
        caller(file, first)


def test_what_cannot_be_done_is_said_in_one_line(file: Path, tmp_path: Path) -> None:
    assert "keys create" in run("list").stderr
    created("alice")
    [only] = json.loads(run("list", "--json").stdout)
    plain = tmp_path / "plain.txt"
    plain.write_text("secret alice\n")
    for arguments, code, said in (
        (("create", "no/body"), 2, "1 to 40"),
        (("revoke", "abcdef"), 1, "keys list"),
        (("revoke", only["id"]), 2, "make another one first"),
        (("list", "--file", str(plain)), 2, "sha256sum"),
        (("create", "bob", "--file", str(plain)), 2, "sha256sum"),
        (("create", "bob", "--file", str(tmp_path / "nowhere" / "keys.txt")), 2, "can be written"),
    ):
        result = run(*arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
        assert said in result.stderr
        assert "secret" not in result.stderr
    assert plain.read_text() == "secret alice\n"


def test_a_file_keeps_its_mode(file: Path) -> None:
    created("alice")
    file.chmod(0o640)
    created("bob")
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_its_target_has_the_keys(file: Path, tmp_path: Path, there: bool) -> None:
    target = tmp_path / "elsewhere" / "keys.txt"
    target.parent.mkdir()
    file.symlink_to("elsewhere/keys.txt")
    keys = [created("bob", "--file", str(target))] if there else []
    keys.append(created("alice"))
    assert file.is_symlink()
    assert [caller(target, key).tenant for key in keys] == (["bob", "alice"] if there else ["alice"])
    created("carol")
    first = json.loads(run("list", "--json").stdout)[0]
    assert run("revoke", first["id"]).exit_code == 0
    assert file.is_symlink()
    assert first["id"] not in target.read_text()


@pytest.mark.parametrize("number", ["1000000", "100000.5", "0.000001", "999999999", "0", "30"])
def test_a_quota_is_kept_as_it_was_given(file: Path, number: str) -> None:
    assert caller(file, created("alice", "--images-per-minute", number)).quota == Quota(None, float(number))
    assert run("list").exit_code == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--images-per-minute", "inf"),
        ("--images-per-minute", "1e-07"),
        ("--images-per-minute", "1000000000"),
        ("--jobs", "1000000000"),
    ],
)
def test_a_quota_that_no_line_can_hold_is_refused(file: Path, option: str, value: str) -> None:
    created("alice")
    before = file.read_text()
    result = run("create", "bob", option, value)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert option in result.stderr
    assert "999999999" in result.stderr
    assert file.read_text() == before


def test_what_servers_would_refuse_is_not_written(file: Path) -> None:
    line = f"sha256:{'a' * 64} alice\n"
    file.write_text(line + line)
    assert "twice" in run("create", "bob").stderr
    assert file.read_text() == line + line


def test_a_file_that_servers_refuse_is_listed_and_told_of(file: Path) -> None:
    created("alice", "--jobs", "1")
    file.write_text(file.read_text() + f"sha256:{'0' * 64} alice jobs=2\n")
    listed = run("list")
    assert listed.exit_code == 2
    assert listed.stdout.count("alice") == 2
    assert "the keys of alice must all say the same" in listed.stderr


def test_a_command_waits_for_another_one_and_brings_nothing_back(file: Path) -> None:
    created("first")
    created("second")
    first = json.loads(run("list", "--json").stdout)[0]
    with alone(file):
        lines = read(file)
        command = [sys.executable, "-m", "streamflow.cli", "keys", "create", "third"]
        other = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(3)
        write(file, remove(lines, [first["id"]]))
    assert other.wait(60) == 0
    assert [one["tenant"] for one in json.loads(run("list", "--json").stdout)] == ["second", "third"]
