"""`streamflow samplers`: what samplers there are, and what one of them does. Needs no server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.tables import print_out, table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from streamflow.flow.programs import Op
    from streamflow.flow.spec import FlowSpec

app = typer.Typer(rich_markup_mode=None)

_BAR_COLUMNS = 32
_COLORS = {"base": "cyan", "refiner": "magenta"}


@app.callback(invoke_without_command=True)
def samplers(ctx: typer.Context) -> None:
    """List the samplers and their options, written as in euler[shift=2]; `samplers show` prints what one of them does.

    \b
    Examples:
        streamflow samplers
        streamflow samplers show H2P4R2
        streamflow samplers show heun --steps 8 --strength 0.6 --guidance-scale 4
    """
    if ctx.invoked_subcommand is None:
        print_out(_list())
        typer.echo("Options are written in brackets, as in --sampler 'euler[shift=2]', several with commas.")


@app.command()
def show(
    sampler: Annotated[str, typer.Argument(help="A name with options in brackets, or blocks such as H2P4R2.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the schedule; by default 4, or what the blocks say.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 = none.")] = 1.0,
    strength: Annotated[float | None, typer.Option(help="Of an image to start from, above 0 to 1.")] = None,
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder; by default a plain rectified flow.")] = None,
) -> None:
    """Print a sampler as the table that the denoiser runs, one line per network evaluation, and draw it.

    \b
    Examples:
        streamflow samplers show H2P4R2 --steps 8
        streamflow samplers show "perflow[prediction=diff_eps,windows=4]" --steps 8
        streamflow samplers show pseudo --steps 6 --model models/shapes
    """
    from streamflow.flow.guidance import Guidance
    from streamflow.flow.samplers import SAMPLERS, SamplerRequest, compile_sampler, parse_sampler, sampler_steps
    from streamflow.validation import check_guidance_scale

    check_guidance_scale(guidance_scale)
    parsed = parse_sampler(sampler)
    flow = _flow(model, parsed.options.get("prediction", "velocity"))
    if parsed.name == "flowedit" and strength is None:
        strength = 1.0
    steps = sampler_steps(sampler, 4) if steps is None else steps
    request = SamplerRequest(steps, Guidance(guidance_scale), strength)
    program = compile_sampler(sampler, request, flow)
    drawn = [
        (str(op.step + 1), op.name, op.network, op.role.name.lower(), str(op.rows), f"{op.timestep:g}", _bar(op))
        for op in program.ops
    ]
    print_out(table("step", "op", "network", "text", "rows", "timestep", "sigma afterwards", rows=drawn))
    typer.echo(f"\n{sampler}: {SAMPLERS[parsed.name].summary}")
    typer.echo(f"{len(program)} network evaluations, {program.rows} rows\n\n{program}")
    for warning in program.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _list() -> Table:
    from streamflow.flow.samplers import SAMPLERS

    rows = [
        (
            name,
            info.summary,
            info.evaluations,
            "\n".join(f"{key}: {option.summary} ({option.allowed})" for key, option in info.options.items()),
        )
        for name, info in SAMPLERS.items()
    ]
    return table("sampler", "what it does", "evaluations per step", "options", rows=rows, lines=True)


def _flow(model: Path | None, prediction: str) -> FlowSpec:
    from streamflow.families import describe
    from streamflow.families.source import checkpoint_at
    from streamflow.flow.spec import FlowSpec, RefinerSpec, WindowSpec

    if model is not None:
        return describe(checkpoint_at(model)).flow
    windows = None if prediction == "velocity" else WindowSpec(prediction=prediction)  # type: ignore[arg-type]
    return FlowSpec(evaluates_data=True, windows=windows, refiner=RefinerSpec(max_step=1.0))


def _bar(op: Op) -> Text:
    from rich.text import Text

    filled = round(op.sigma * _BAR_COLUMNS)
    bar = "█" * filled + "·" * (_BAR_COLUMNS - filled)
    return Text(f"{bar} {op.sigma:.4f}", style=_COLORS[op.network])
