"""What importing the package costs, and which names it offers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import streamflow
import streamflow.client

HEAVY = ("torch", "diffusers", "transformers", "redis", "pydantic", "typer", "rich")


def loaded_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(answer.stdout.split())


def test_the_package_alone_loads_nothing_else() -> None:
    assert not loaded_after("import streamflow") & {*HEAVY, "grpc", "numpy", "PIL"}


def test_the_client_needs_the_base_install_only() -> None:
    loaded = loaded_after("from streamflow import AsyncClient, Client; Client('127.0.0.1:1').close()")
    assert "grpc" in loaded
    assert not loaded & set(HEAVY)


def test_the_command_line_loads_nothing_heavy_before_it_is_needed() -> None:
    loaded = loaded_after("import streamflow.cli.app")
    assert "typer" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "redis", "grpc", "PIL"}


def test_the_exported_names() -> None:
    assert streamflow.__all__ == [
        "AlreadyExistsError",
        "AsyncClient",
        "BusyError",
        "Client",
        "DeadlineError",
        "GenerationError",
        "InvalidRequestError",
        "JobCancelledError",
        "NotFoundError",
        "PermissionDeniedError",
        "Pipeline",
        "Result",
        "StreamFlowError",
        "UnauthenticatedError",
        "UnavailableError",
        "__version__",
    ]
    assert set(streamflow.__all__) <= set(dir(streamflow))
    for name in set(streamflow.__all__) - {"Pipeline"}:
        assert getattr(streamflow, name) is not None
    for name in streamflow.client.__all__:
        assert getattr(streamflow.client, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Klient"):
        _ = streamflow.Klient


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert streamflow.__version__ == project["version"]
