"""What `streamflow generate` and `streamflow edit` share: their options, and from a request to files."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.outputs import choose_names
from streamflow.errors import StreamFlowError

if TYPE_CHECKING:
    from streamflow.client import Client, GenerateOptions, ImageInfo, Result

OutputOption = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE|FOLDER|PATTERN",
        help="Where to write; a pattern may hold {index}, {seed}, {request_id} and {suffix}.",
    ),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What to steer away from, with guidance above 1.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the sampler's schedule.")]
TimeBudget = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="In place of steps: the server chooses what fits into this time."),
]
MinSteps = Annotated[int | None, typer.Option(min=1, help="With --time-budget: no fewer steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 = none.")]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(metavar="START:END", help="Sigmas between which guidance acts, such as 0.9:0.2; 1 = noise."),
]
GuidanceMode = Annotated[str | None, typer.Option(help="full; or, experimental, self-negative or onetime-negative.")]
TrueCfgScale = Annotated[
    float | None,
    typer.Option(help="Guidance with the negative prompt, for models that are fed --guidance-scale (FLUX)."),
]
ClassLabels = Annotated[
    list[int] | None, typer.Option("--class-label", min=0, help="In place of prompts, where a model takes labels.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME[=WEIGHT]", help="A LoRA adapter; may be given several times."),
]
Control = Annotated[str | None, typer.Option(help="A ControlNet; `streamflow models` lists them.")]
ControlImage = Annotated[Path | None, typer.Option(help="What the ControlNet reads, such as edges.")]
ControlScale = Annotated[float | None, typer.Option(help="How strongly the ControlNet acts; 1 unless given.")]
Seed = Annotated[int | None, typer.Option(help="Of the first image; the next ones count up.")]
NumImages = Annotated[int, typer.Option("--num-images", "-n", min=1, help="Images for each prompt.")]
Pixels = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
SamplerOption = Annotated[
    str | None,
    typer.Option(help="A name, with options as in euler[shift=2], or blocks; `streamflow samplers` lists them."),
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="png, jpeg, webp or raw; by default what FILE ends with, or png.")
]
Quality = Annotated[int | None, typer.Option(min=1, max=100, help="For JPEG and WebP.")]
Decoder = Annotated[str | None, typer.Option(help="tiny (fast) or full (best).")]
Strength = Annotated[float | None, typer.Option(help="How far it is changed, above 0 to 1.")]
Mask = Annotated[Path | None, typer.Option(help="White = repaint, black = keep.")]
Preview = Annotated[
    bool, typer.Option("--preview", help="Write and show previews, after every step as far as time allows.")
]
PreviewEvery = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Write and show previews, after every N steps as far as time allows."),
]
PriorityOption = Annotated[str, typer.Option(help="low, normal or high.")]
ModelOption = Annotated[str | None, typer.Option(help="A name from `streamflow models`.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds until it is given up.")]
Overwrite = Annotated[bool, typer.Option(help="Replace existing files whatever their names came from.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: files, seeds, timings.")]

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".rgb": "raw"}


def format_of(given: str | None, output: str) -> str:
    """What was asked for, or what the file's name ends with."""
    suffix = Path(output).suffix.lower()
    if given is None and suffix and suffix not in _FORMATS and "{" not in suffix:
        message = f"got {output!r}; a name that ends with {', '.join(_FORMATS)}, or --format"
        raise typer.BadParameter(message, param_hint="--output")
    return given or _FORMATS.get(suffix, "png")


def interval_of(given: str | None) -> tuple[float, float] | None:
    """Reads START:END."""
    if given is None:
        return None
    start, _, end = given.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        message = f"got {given!r}; two sigmas as START:END, such as 0.9:0.2"
        raise typer.BadParameter(message, param_hint="--guidance-interval") from None


def adapters_of(given: list[str] | None) -> dict[str, float]:
    """Reads NAME or NAME=WEIGHT, each."""
    found: dict[str, float] = {}
    for text in given or ():
        name, equals, weight = text.partition("=")
        try:
            if name in found:
                raise ValueError(f"{name} is given twice")
            found[name] = float(weight) if equals else 1.0
        except ValueError:
            message = f"got {text!r}; NAME or NAME=WEIGHT, each name once, such as sketch=0.8"
            raise typer.BadParameter(message, param_hint="--adapter") from None
    return found


def make(
    connect: Callable[[], Client],
    prompts: list[str],
    options: GenerateOptions,
    *,
    output: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Asks for the pictures with a progress bar, writes them and says where; leaving early cancels the job."""
    from streamflow.cli.progress import show_progress
    from streamflow.client.result import write_files

    subjects = len(prompts) or len(options.get("class_labels", ()))
    paths = choose_names(output, options, count=subjects * options["num_images"], overwrite=overwrite)
    with (
        _terminated_as_interrupted(),
        connect() as client,
        show_progress(paths) as on_event,
        _cancelled_when_left(client, options),
    ):
        result = client.generate(prompts, on_event=on_event, **options)
    write_files(result.files, paths)
    for warning in result.warnings:
        typer.echo(f"warning: {warning.message}", err=True)
    if as_json:
        typer.echo(_describe(result, paths))
    else:
        for path, info in zip(paths, result.infos, strict=True):
            typer.echo(f"{path}  (seed {info.seed}{_chosen(info) if options.get('time_budget_s') else ''})")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is what Ctrl-C is, so that it cancels the job as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _cancelled_when_left(client: Client, options: GenerateOptions) -> Iterator[None]:
    """The client leaves a job with a given id to others; this id was made here, and nobody else has it."""
    from streamflow.client.base import CANCEL_TIMEOUT_S

    try:
        yield
    except StreamFlowError:
        # The job was refused, or it has ended, or nobody can be told.
        raise
    except BaseException:
        with suppress(StreamFlowError):
            client.cancel(options["request_id"] or "", timeout_s=CANCEL_TIMEOUT_S)
        raise


def _chosen(info: ImageInfo) -> str:
    """What the server made of a time budget."""
    return f", {info.steps} steps of {info.sampler}, {info.decoder} decoder"


def _describe(result: Result, paths: list[Path]) -> str:
    images = [{"path": str(path), **asdict(info)} for path, info in zip(paths, result.infos, strict=True)]
    about = {
        "request_id": result.request_id,
        "seed": result.seed,
        "images": images,
        "warnings": [warning.message for warning in result.warnings],
        "timings": result.timings,
    }
    return json.dumps(about, indent=2)
