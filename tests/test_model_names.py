"""How further models are named, and what the gateway's settings make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamflow.config import GatewaySettings, StageSettings, settings_from
from streamflow.model_names import read_model, read_models, write_models


def settings(*options: str) -> GatewaySettings:
    return settings_from(["--model", "folder/shapes", *options], GatewaySettings, program="gateway")


@pytest.mark.parametrize(
    "options",
    [
        ["--more-models", "rings=/m/rings", "--more-models", "stars=m/stars"],
        ["--more-models", "rings=/m/rings,stars=m/stars"],
        ["--more-models=rings=/m/rings, stars=m/stars,"],
    ],
)
def test_further_models_are_options_or_one_variable(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"rings": Path("/m/rings"), "stars": Path("m/stars")}
    assert settings(*options).more_models == expected
    monkeypatch.setenv("STREAMFLOW_MORE_MODELS", "others=/m/others")
    assert settings(*options).more_models == expected
    monkeypatch.setenv("STREAMFLOW_MORE_MODELS", write_models(expected))
    assert settings().more_models == expected


@pytest.mark.parametrize("value", [None, "", " "])
def test_there_need_be_none(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is not None:
        monkeypatch.setenv("STREAMFLOW_MORE_MODELS", value)
    assert settings().more_models == {}
    assert settings().each() == [settings()]


def test_each_model_has_settings_as_if_it_were_alone() -> None:
    both = settings("--more-models", "rings=/m/rings", "--deployment", "test", "--max-jobs", "7")
    alone = settings("--deployment", "test", "--max-jobs", "7")
    rings = settings_from(
        ["--model", "/m/rings", "--model-name", "rings", "--deployment", "test-rings", "--max-jobs", "7"],
        GatewaySettings,
        program="gateway",
    )
    assert both.each() == [alone, rings]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("rings", "got 'rings'; allowed: NAME=PATH, and a comma between several"),
        ("rings=", "got 'rings='"),
        ("=/m/rings", "got '=/m/rings'"),
        ("a=/m/a,a=/m/b", "got 'a=/m/b'; allowed: every name once; a is /m/a already; give it another name"),
        ("shapes=/m/a", "got 'shapes'; allowed: a name other than the default model's; give it another name"),
        ("v1.5=/m/a", "got 'v1.5'; allowed: A-Z a-z 0-9 _ -, and at most 40 of them in default-NAME"),
        ("x" * 33 + "=/m/a", "and at most 40 of them in default-NAME; give it another name, as NAME=PATH"),
    ],
)
def test_names_that_cannot_be_used_are_said_in_one_line(
    given: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        settings("--more-models", given)
    assert refusal.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("gateway: more_models: ")
    assert says in line


def test_the_longest_name_fills_the_deployments() -> None:
    [_, further] = settings("--more-models", "x" * 32 + "=/m/a").each()
    assert len(further.deployment) == 40


def test_the_name_of_the_default_model_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings("--more-models", "shapes=/m/a", "--model-name", "rings").more_models == {"shapes": Path("/m/a")}
    with pytest.raises(SystemExit):
        settings("--more-models", "rings=/m/a", "--model-name", "rings")


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("models/shapes", "", "models/shapes"),
        ("a=models/shapes", "a", "models/shapes"),
        ("a=b=c", "a", "b=c"),
        ("./a=b", "", "./a=b"),
        ("v1.5=b", "v1.5", "b"),
        ("=b", "", "=b"),
    ],
)
def test_a_path_may_have_a_name_in_front(text: str, name: str, path: str) -> None:
    assert read_model(text) == (name, path)


def test_what_is_written_is_read() -> None:
    models = {"a": Path("/m/a=b"), "c-d": Path("e f/g")}
    assert read_models(write_models(models)) == models


@pytest.mark.parametrize(("kind", "said"), [(GatewaySettings, "The gateway"), (StageSettings, "A stage")])
def test_the_help_says_what_the_program_is(
    kind: type[GatewaySettings | StageSettings], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        settings_from(["--help"], kind, program="it")
    assert f"\n\n{said} of a deployment: " in capsys.readouterr().out
