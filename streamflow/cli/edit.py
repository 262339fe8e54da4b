"""`streamflow edit`: change a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamflow.cli import making
from streamflow.cli.connection import Address, ApiKey, Tls, TlsCa, connect

FLOW_EDIT = "flowedit"


def edit(
    image: Annotated[Path, typer.Argument(help="The picture to change: a PNG, JPEG or WebP.")],
    prompt: Annotated[str, typer.Argument(help="What it shall show.")],
    output: making.OutputOption = "streamflow-{seed}.{suffix}",
    source_prompt: Annotated[
        str | None, typer.Option("--source-prompt", "-s", help="What it shows now: then only the difference changes.")
    ] = None,
    mask: making.Mask = None,
    strength: making.Strength = None,
    negative_prompt: making.NegativePrompt = None,
    steps: making.Steps = None,
    guidance_scale: making.GuidanceScale = None,
    guidance_interval: making.GuidanceInterval = None,
    seed: making.Seed = None,
    num_images: making.NumImages = 1,
    width: making.Pixels = None,
    height: making.Pixels = None,
    sampler: making.SamplerOption = None,
    image_format: making.FormatOption = None,
    quality: making.Quality = None,
    decoder: making.Decoder = None,
    preview: making.Preview = False,
    preview_every: making.PreviewEvery = None,
    priority: making.PriorityOption = "normal",
    model: making.ModelOption = None,
    timeout: making.Timeout = 600.0,
    overwrite: making.Overwrite = False,
    json: making.Json = False,
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Change a picture, in one of three ways.

    With PROMPT alone it is noised as far as --strength says and drawn again. With --mask only what is white there is
    drawn. With --source-prompt, which says what the picture shows now, the difference of the two texts is followed
    (FlowEdit), which keeps what both have in common.

    \b
    Examples:
        streamflow edit circle.png "a large blue circle on a white background" --strength 0.6 -o blue.png
        streamflow edit circle.png "a large red star on a white background" --mask middle.png -o star.png
        streamflow edit circle.png "a large green circle on a white background" \\
            --source-prompt "a large red circle on a white background" --steps 25 -o green.png
    """
    from streamflow.client import GenerateOptions

    if sampler is None and source_prompt is not None:
        sampler = FLOW_EDIT
    options = GenerateOptions(
        image=image,
        source_prompt=source_prompt,
        mask=mask,
        strength=strength,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=making.interval_of(guidance_interval),
        seed=seed,
        num_images=num_images,
        width=width,
        height=height,
        sampler=sampler,
        format=making.format_of(image_format, output),
        quality=quality,
        decoder=decoder,
        preview_interval_steps=preview_every or int(preview),
        priority=priority,
        model=model,
    )
    making.make(
        lambda: connect(address, api_key, tls, tls_ca, timeout_s=timeout),
        [prompt],
        options,
        output=output,
        overwrite=overwrite,
        as_json=json,
    )
