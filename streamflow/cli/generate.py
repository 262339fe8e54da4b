"""`streamflow generate`: pictures from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamflow.cli import making
from streamflow.cli.connection import Address, ApiKey, Tls, TlsCa, connect


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; several make several.")
    ] = None,
    output: making.OutputOption = "streamflow-{seed}.{suffix}",
    negative_prompt: making.NegativePrompt = None,
    steps: making.Steps = None,
    time_budget: making.TimeBudget = None,
    min_steps: making.MinSteps = None,
    guidance_scale: making.GuidanceScale = None,
    true_cfg_scale: making.TrueCfgScale = None,
    guidance_interval: making.GuidanceInterval = None,
    guidance_mode: making.GuidanceMode = None,
    seed: making.Seed = None,
    num_images: making.NumImages = 1,
    width: making.Pixels = None,
    height: making.Pixels = None,
    sampler: making.SamplerOption = None,
    image_format: making.FormatOption = None,
    quality: making.Quality = None,
    decoder: making.Decoder = None,
    init_image: Annotated[Path | None, typer.Option(help="A picture to start from; see also `edit`.")] = None,
    strength: making.Strength = None,
    mask: making.Mask = None,
    adapter: making.Adapters = None,
    control: making.Control = None,
    control_image: making.ControlImage = None,
    control_scale: making.ControlScale = None,
    class_label: making.ClassLabels = None,
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
    """Make pictures of one or more prompts.

    A FILE that is named in full is replaced; files whose names are made here, from a folder, a pattern or for several
    images, must not be there yet (or --overwrite). Progress goes to stderr, the files' names to stdout. Ctrl-C cancels.

    \b
    Examples:
        streamflow generate "a large red circle on a white background" -o circle.png --steps 4 --seed 7
        streamflow generate "a cyan star" "an orange ring" -n 4 -o "out/{index}-{seed}.png" --guidance-scale 3
        streamflow generate "a yellow triangle" --sampler H1P5R2 -o triangle.webp
        streamflow generate "a green cross" --steps 25 --preview-every 5 --json
        streamflow generate "a house by a lake" --adapter watercolor=0.8 --control canny --control-image edges.png
        streamflow generate --class-label 207 --class-label 88 --guidance-scale 4 -o out/
        streamflow generate "a blue star" --time-budget 0.5 --min-steps 2 -o star.png
    """
    from streamflow.client import GenerateOptions

    if not prompts and not class_label:
        raise typer.BadParameter("missing; say what to draw, in quotes (or --class-label)", param_hint="PROMPT")
    options = GenerateOptions(
        negative_prompt=negative_prompt,
        steps=steps,
        time_budget_s=time_budget,
        min_steps=min_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        guidance_interval=making.interval_of(guidance_interval),
        guidance_mode=guidance_mode,
        seed=seed,
        num_images=num_images,
        width=width,
        height=height,
        sampler=sampler,
        format=making.format_of(image_format, output),
        quality=quality,
        decoder=decoder,
        image=init_image,
        strength=strength,
        mask=mask,
        adapters=making.adapters_of(adapter),
        control=control,
        control_image=control_image,
        control_scale=control_scale,
        class_labels=class_label or (),
        preview_interval_steps=preview_every or int(preview),
        priority=priority,
        model=model,
    )
    making.make(
        lambda: connect(address, api_key, tls, tls_ca, timeout_s=timeout),
        prompts or [],
        options,
        output=output,
        overwrite=overwrite,
        as_json=json,
    )
