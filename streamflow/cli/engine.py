"""`streamflow engine export | list`: networks as graphs, for the runtimes that are faster than torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.tables import print_out, table

if TYPE_CHECKING:
    from streamflow.backends.graphs import GraphStore
    from streamflow.backends.parts import Part

app = typer.Typer(
    name="engine",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Export the networks of a checkpoint as graphs, which ONNX Runtime and OpenVINO run faster than torch does.",
)

Model = Annotated[
    Path | None, typer.Option(help="Checkpoint folder in diffusers layout; by default the built-in model.")
]
Engines = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where graphs are kept [STREAMFLOW_ENGINES, the user's cache].")
]


@app.command()
def export(
    model: Model = None,
    engines: Engines = None,
    part: Annotated[
        list[str] | None, typer.Option(help="A network, such as unet; may be repeated. By default all.")
    ] = None,
) -> None:
    """Export networks to ONNX, and test each on the runtimes that are installed.

    What is there already and still fits is left as it is. A graph takes any number of rows, any size, and a timestep of
    its own in every row.

    \b
    Examples:
        streamflow engine export
        streamflow engine export --model checkpoints/stable-diffusion-1.5 --part unet --part vae_decoder
    """
    from rich.console import Console

    from streamflow.errors import InvalidRequestError

    store, parts = _opened(model, engines)
    unknown = set(part or ()) - parts.keys()
    if unknown:
        raise InvalidRequestError("part", min(unknown), ", ".join(parts))
    console, rows = Console(stderr=True), []
    for name in part or parts:
        began_s = time.monotonic()
        with console.status(f"exporting {name}"):
            path = store.make(parts[name])
        with console.status(f"testing {name}"):
            results = "\n".join(_tested(store, parts[name]))
        rows.append((name, f"{path.stat().st_size / 2**20:.1f}", f"{time.monotonic() - began_s:.0f}", results))
    print_out(table("network", "MiB", "seconds", "difference to torch", rows=rows))
    typer.echo(f"in {path.parent}")


@app.command("list")
def list_graphs(model: Model = None, engines: Engines = None) -> None:
    """List the networks of a checkpoint, and which of them have a graph that can be used.

    \b
    Examples:
        streamflow engine list
    """
    from streamflow.errors import NotFoundError

    store, parts = _opened(model, engines)
    rows = []
    for name, part in parts.items():
        try:
            state = str(store.find(part))
        except NotFoundError as error:
            state = str(error).partition(": ")[2]
        rows.append((name, state))
    print_out(table("network", "graph", rows=rows))


def _opened(model: Path | None, engines: Path | None) -> tuple[GraphStore, dict[str, Part]]:
    from streamflow.backends.graphs import GraphStore
    from streamflow.config import EngineSettings, default_model
    from streamflow.families import parts

    store = GraphStore(engines or EngineSettings().engines)
    return store, {part.name: part for part in parts(model or default_model())}


def _tested(store: GraphStore, part: Part) -> Iterator[str]:
    """How each runtime does that is installed."""
    from streamflow.backends.select import ON_CPU

    for name, runtime in ON_CPU.items():
        if find_spec(name) is None:
            yield f"{name}: not installed"
            continue
        tested = store.test(part, runtime(store.path(part)))
        bits = "equal bits whatever the neighbours" if tested.row_invariant else "bits depend on the neighbours"
        yield f"{name}: {tested.error:.1e}, {bits}"
