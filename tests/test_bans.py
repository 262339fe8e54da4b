"""What nothing in the product may do: unpickle, evaluate, start a shell. Read from the syntax of every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamflow.config import ModelSettings

ROOT = Path(__file__).parent.parent
PRODUCT = ("streamflow", "services", "gateway")

MODULES = (
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "telnetlib",
)
CALLS = ("torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen")
BUILTINS = ("eval", "exec", "__import__")
# A keyword and what it may not be: anything but these.
KEYWORDS = {"shell": (False,), "allow_pickle": (False,), "trust_remote_code": (False,), "weights_only": (True,)}
# Weights of the user's own choosing, where the setting allow_pickle allows them.
THE_ONE_PLACE = "streamflow/families/libraries.py"


def offences(source: str) -> Iterator[str]:
    """What is banned in a module, with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"{node.lineno}: import {one.name}" for one in names if one.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES:
                    yield f"{node.lineno}: from {module}"
                called = (f"{module}.{one.name}" for one in names)
                yield from (f"{node.lineno}: from {name}" for name in called if name in CALLS)
            case ast.Call():
                yield from (f"{node.lineno}: {one}" for one in _in_call(node))


def _in_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    if name in BUILTINS or any(name == banned or name.endswith("." + banned) for banned in CALLS):
        yield name
    for keyword in call.keywords:
        allowed = KEYWORDS.get(keyword.arg or "")
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
        # Our own functions pass allow_pickle on, from the setting to the one place.
        ours = keyword.arg == "allow_pickle" and name.rpartition(".")[2] != "load"
        if allowed is not None and value not in allowed and not ours:
            yield f"{name}({keyword.arg}={ast.unparse(keyword.value)})"


def modules() -> list[Path]:
    return sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))


def test_nothing_in_the_product_is_banned() -> None:
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text("utf-8"))) for path in modules()}
    assert len(found) > 100
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_weights_that_can_run_code_are_read_in_one_place_and_only_when_asked_for() -> None:
    readers = [path for path in modules() if re.search(r"use_safetensors=(?!True)", path.read_text("utf-8"))]
    assert [str(path.relative_to(ROOT)) for path in readers] == [THE_ONE_PLACE]
    assert ModelSettings.model_fields["allow_pickle"].default is False


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from pickle import loads",
        "import dill.source",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(line, shell=True)",
        "run(line, shell=maybe)",
        "os.system('ls')",
        "eval('1')",
        "x = exec(code)",
        "from_pretrained(name, trust_remote_code=True)",
        "def f():\n    import shelve",
    ],
)
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source", ["module.eval()", "np.load(path, allow_pickle=False)", "safetensors.torch.load_file(p)"]
)
def test_the_check_leaves_the_rest_alone(source: str) -> None:
    assert not list(offences(source))
