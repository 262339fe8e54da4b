"""`streamflow engine export | build | list`: networks as graphs, for the runtimes that are faster than torch."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.tables import print_out, table

if TYPE_CHECKING:
    from rich.status import Status

    from streamflow.backends.graphs import GraphStore
    from streamflow.backends.parts import Part
    from streamflow.families.checkpoint import Checkpoint
    from streamflow.types import ModelCard

app = typer.Typer(
    name="engine",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Export the networks of a checkpoint as graphs, which ONNX Runtime and OpenVINO run faster than torch does.",
)

Model = Annotated[
    Path | None,
    typer.Option(help="Checkpoint folder, or a name on the Hugging Face hub; by default the built-in model."),
]
Flow = Annotated[str, typer.Option(help="As which its weights are served; see --flow of the services.")]
Engines = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where graphs are kept [STREAMFLOW_ENGINES, the user's cache].")
]


@app.command()
def export(
    model: Model = None,
    flow: Flow = "auto",
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

    from streamflow.backends.select import open_parts
    from streamflow.families.source import checkpoint_at
    from streamflow.stages.denoiser import DenoiserStage

    checkpoint = checkpoint_at(model, flow=flow)
    store, parts = _opened(checkpoint, engines)
    console, rows = Console(stderr=True), []
    for name in _chosen(parts, part):
        began_s = time.monotonic()
        with console.status(f"exporting {name}"):
            path = store.make(parts[name])
        with console.status(f"testing {name}"):
            results = "\n".join(_tested(store, parts[name]))
            # Measured now, on a machine that is not yet busy, and remembered for the services.
            taken = open_parts("cpu", engines=store.folder)(parts[name]).name
        rows.append((name, f"{path.stat().st_size / 2**20:.1f}", f"{time.monotonic() - began_s:.0f}", results, taken))
    if not part:
        # The number of slots follows from it; services that start beside each other would measure each other.
        with console.status("measuring what calls of the denoiser take"):
            DenoiserStage.load(checkpoint, device="cpu", engines=store.folder)
    print_out(table("network", "MiB", "seconds", "difference to torch", "fastest here", rows=rows))
    typer.echo(f"in {path.parent}")


@app.command()
def build(
    model: Model = None,
    flow: Flow = "auto",
    engines: Engines = None,
    part: Annotated[
        list[str] | None, typer.Option(help="A network, such as unet; may be repeated. By default all.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Most rows of a call; a guided image has two.")] = 16,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Of pictures; may be repeated. By default the model's own."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision: float16, bfloat16 or float32.")] = "float16",
    device: Annotated[str, typer.Option(help="The GPU, such as cuda:1.")] = "cuda",
    refittable: Annotated[bool, typer.Option(help="Weights can be exchanged later; may be slower.")] = False,
    version_compatible: Annotated[
        bool, typer.Option(help="Later versions of TensorRT, and its lean runtime, can use it; may be slower.")
    ] = False,
) -> None:
    """Build TensorRT engines for this machine's GPU; takes minutes for each network.

    The numbers of rows for which kernels are chosen follow from what calls of torch take here; others are padded.

    \b
    Examples:
        streamflow engine build
        streamflow engine build --model checkpoints/stable-diffusion-1.5 --rows 32 --size 512x512 --size 768x512
    """
    from functools import partial

    from rich.console import Console

    from streamflow.backends import tensorrt_build
    from streamflow.backends.cost import cost_of
    from streamflow.backends.engine_cache import EngineCache, Options, Profiles
    from streamflow.backends.runtime import resolve_device, resolve_dtype
    from streamflow.backends.tensorrt_runtime import platform
    from streamflow.backends.torch_eager import TorchRunner
    from streamflow.errors import InvalidRequestError
    from streamflow.families import describe
    from streamflow.families.source import checkpoint_at

    where = resolve_device(device)
    if where.type != "cuda":
        raise InvalidRequestError("device", device, "a GPU: engines are built on the kind of card that runs them")
    precision = resolve_dtype(dtype, where)
    checkpoint = checkpoint_at(model, flow=flow)
    store, parts = _opened(checkpoint, engines)
    chosen, card = _chosen(parts, part), describe(checkpoint)
    sizes = tuple(sorted(read_size(one, card) for one in size or [f"{card.default_width}x{card.default_height}"]))
    cache = EngineCache(store, platform(where), dtype=precision)
    console, made = Console(stderr=True), []
    options = Options(refittable=refittable, version_compatible=version_compatible)
    for name in chosen:
        began_s = time.monotonic()
        with console.status(f"{name}: what a call takes") as status:
            runner = TorchRunner(parts[name], device=where, dtype=precision)
            cost = cost_of(parts[name], runner, [count for count in (1, 2, 4, 8) if count <= max(rows, 2)])
            del runner
            profiles = Profiles(cost.buckets(rows), sizes)
            status.update(f"{name}: exporting")

            def show(phase: str, done: int, steps: int, status: Status = status, name: str = name) -> None:
                status.update(f"{name}: {phase}, {done} of {steps}")

            built = cache.make(parts[name], profiles, partial(tensorrt_build.build, on_phase=show), options)
        counts = ", ".join(map(str, profiles.rows))
        size_mib = built.path.stat().st_size / 2**20
        made.append((name, counts, f"{size_mib:.1f}", f"{time.monotonic() - began_s:.0f}"))
    print_out(table("network", "rows", "MiB", "seconds", rows=made))


@app.command("list")
def list_graphs(model: Model = None, flow: Flow = "auto", engines: Engines = None) -> None:
    """List the networks of a checkpoint, whether their graphs can be used, and what engines there are of them.

    \b
    Examples:
        streamflow engine list
    """
    from streamflow.backends.engine_cache import engines_of
    from streamflow.errors import NotFoundError
    from streamflow.families.source import checkpoint_at

    store, parts = _opened(checkpoint_at(model, flow=flow), engines)
    rows = []
    for name, part in parts.items():
        try:
            state = str(store.find(part))
        except NotFoundError as error:
            state = str(error).partition(": ")[2]
        rows.append((name, state))
    print_out(table("network", "graph", rows=rows))
    engines_there = [line for part in parts.values() for line in engines_of(store, part)]
    if engines_there:
        print_out(table("network", "engine", "for", "rows", "pictures", rows=engines_there))


def _opened(checkpoint: Checkpoint, engines: Path | None) -> tuple[GraphStore, dict[str, Part]]:
    from streamflow.backends.graphs import GraphStore
    from streamflow.config import EngineSettings
    from streamflow.families import parts

    store = GraphStore(engines or EngineSettings().engines)
    return store, {part.name: part for part in parts(checkpoint)}


def _chosen(parts: Mapping[str, Part], wanted: Sequence[str] | None) -> Sequence[str]:
    from streamflow.errors import InvalidRequestError

    unknown = set(wanted or ()) - parts.keys()
    if unknown:
        raise InvalidRequestError("part", min(unknown), ", ".join(parts))
    return wanted or list(parts)


def read_size(text: str, card: ModelCard) -> tuple[int, int]:
    """(height, width) in pixels."""
    from streamflow.errors import InvalidRequestError
    from streamflow.validation import check_size

    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise InvalidRequestError("size", text, "WIDTHxHEIGHT in pixels, such as 768x512")
    width, height = int(found[1]), int(found[2])
    check_size(card, "width", width)
    check_size(card, "height", height)
    return height, width


def _tested(store: GraphStore, part: Part) -> Iterator[str]:
    """How each runtime does that is installed."""
    from streamflow.backends.runtime import available_cores
    from streamflow.backends.select import ON_CPU

    for name, runtime in ON_CPU.items():
        if find_spec(name) is None:
            yield f"{name}: not installed"
            continue
        tested = store.test(part, runtime(store.path(part)), cores=available_cores())
        bits = "equal bits whatever the neighbours" if tested.row_invariant else "bits depend on the neighbours"
        yield f"{name}: {tested.error:.1e}, {bits}"
