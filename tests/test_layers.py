"""Who may import whom, read from the imports of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Package or module -> what nothing in it may import.
FORBIDDEN = {
    "streamflow": ("services", "gateway", "tests", "training"),
    "streamflow/flow": ("grpc", "redis", "google", "diffusers", "transformers"),
    "streamflow/batching": ("grpc", "redis", "google", "diffusers", "transformers"),
    "streamflow/backends": ("grpc", "redis", "google"),
    "streamflow/transport": ("torch", "diffusers", "transformers"),
    "streamflow/rpc": ("torch", "diffusers", "transformers", "redis"),
    "streamflow/client": ("torch", "redis", "pydantic", "pydantic_settings", "typer", "rich"),
    "gateway": ("torch", "diffusers", "transformers", "services"),
    "services/encoder": ("services.denoiser", "services.decoder", "gateway"),
    "services/denoiser": ("services.encoder", "services.decoder", "gateway"),
    "services/decoder": ("services.encoder", "services.denoiser", "gateway"),
}


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "v1" not in path.parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder: str) -> None:
    paths = modules(folder)
    assert paths, f"{folder} has no modules"
    for path in paths:
        for name in imports(path):
            clash = [bad for bad in FORBIDDEN[folder] if name == bad or name.startswith(bad + ".")]
            assert not clash, f"{path.relative_to(ROOT)} imports {name}"


def test_the_environment_is_read_in_config_only() -> None:
    for folder in ("streamflow", "services", "gateway"):
        for path in modules(folder):
            if path.name == "config.py":
                continue
            reads = [
                node.lineno
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
            ]
            assert not reads, f"{path.relative_to(ROOT)} reads the environment in lines {reads}"
