"""`streamflow generate`: pictures from the command line."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.connection import Address, ApiKey, Tls, TlsCa, connect

if TYPE_CHECKING:
    from streamflow.client import GenerateOptions, Result

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".rgb": "raw"}


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; several make several.")],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE|FOLDER|PATTERN",
            help="Where to write; a pattern may hold {index}, {seed}, {request_id} and {suffix}.",
        ),
    ] = "streamflow-{seed}.{suffix}",
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from, with guidance above 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Network evaluations.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 = none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first image; the next ones count up.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Images for each prompt.")] = 1,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    sampler: Annotated[str | None, typer.Option(help="A name from `streamflow models`.")] = None,
    image_format: Annotated[
        str | None, typer.Option("--format", help="png, jpeg, webp or raw; by default what FILE ends with, or png.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="1 to 100, for JPEG and WebP.")] = None,
    decoder: Annotated[str | None, typer.Option(help="tiny (fast) or full (best).")] = None,
    init_image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far it is changed, above 0 to 1.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White = repaint, black = keep.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Write and show a preview after every step.")] = False,
    preview_every: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Write and show a preview after every N steps.")
    ] = None,
    priority: Annotated[str, typer.Option(help="low, normal or high.")] = "normal",
    model: Annotated[str | None, typer.Option(help="A name from `streamflow models`.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until it is given up.")] = 600.0,
    overwrite: Annotated[bool, typer.Option(help="Replace existing files whatever their names came from.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: files, seeds, timings.")] = False,
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Make pictures of one or more prompts.

    A FILE that is named in full is replaced; files whose names are made here, from a folder, a pattern or for several
    images, must not be there yet (or --overwrite). Progress goes to stderr, the files' names to stdout. Ctrl-C cancels.

    \b
    Examples:
        streamflow generate "a large red circle on a white background" -o circle.png --steps 4 --seed 7
        streamflow generate "a cyan star" "an orange ring" -n 4 -o "out/{index}-{seed}.png" --guidance-scale 3
        streamflow generate "a blue square" --init-image circle.png --strength 0.6 -o square.webp
        streamflow generate "a green cross" --steps 25 --preview-every 5 --json
    """
    from streamflow.cli.progress import show_progress
    from streamflow.client import GenerateOptions

    options = GenerateOptions(
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        num_images=num_images,
        width=width,
        height=height,
        sampler=sampler,
        format=image_format or _FORMATS.get(Path(output).suffix.lower(), "png"),
        quality=quality,
        decoder=decoder,
        image=init_image,
        strength=strength,
        mask=mask,
        preview_interval_steps=preview_every or int(preview),
        priority=priority,
        model=model,
    )
    paths = _choose_names(output, options, seed=seed, count=len(prompts) * num_images, overwrite=overwrite)
    with connect(address, api_key, tls, tls_ca, timeout_s=timeout) as client, show_progress(paths) as on_event:
        result = client.generate(prompts, on_event=on_event, **options)
    _write(result, paths)
    for warning in result.warnings:
        typer.echo(f"warning: {warning.message}", err=True)
    if json:
        typer.echo(_describe(result, paths))
    else:
        for path, info in zip(paths, result.infos, strict=True):
            typer.echo(f"{path}  (seed {info.seed})")


def _choose_names(
    output: str, options: GenerateOptions, *, seed: int | None, count: int, overwrite: bool
) -> list[Path]:
    """Fixes the request's id and seed, because names may hold them, and refuses before there is any work."""
    from streamflow.client.request import image_format, new_request_id, seed_of
    from streamflow.client.result import output_paths, suffix_of

    request_id = options["request_id"] = new_request_id()
    first = options["seed"] = seed_of(request_id) if seed is None else seed
    suffix = suffix_of(image_format(options["format"]))
    try:
        paths = output_paths(output, request_id=request_id, seeds=range(first, first + max(count, 1)), suffix=suffix)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None
    taken = [path for path in paths if path.exists() and str(path) != str(Path(output))]
    if taken and not overwrite:
        raise typer.BadParameter(f"{taken[0]} exists; choose another name or add --overwrite", param_hint="--output")
    return paths


def _write(result: Result, paths: list[Path]) -> None:
    for path, data in zip(paths, result.files, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _describe(result: Result, paths: list[Path]) -> str:
    images = [{"path": str(path), **asdict(info)} for path, info in zip(paths, result.infos, strict=True)]
    about = {
        "request_id": result.request_id,
        "seed": result.seed,
        "images": images,
        "warnings": [warning.message for warning in result.warnings],
        "timings": result.timings,
    }
    return json_module.dumps(about, indent=2)
