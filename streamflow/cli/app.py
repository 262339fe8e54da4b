"""The commands, put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import streamflow
from streamflow.cli import dead, edit, generate, inspect, samplers, up
from streamflow.errors import StreamFlowError


class _OneLineErrors(TyperGroup):
    """What goes wrong on purpose is one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (StreamFlowError, OSError) as error:
            typer.echo(f"streamflow: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="streamflow",
    cls=_OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("generate")(generate.generate)
app.command("edit")(edit.edit)
app.add_typer(samplers.app, name="samplers")
app.command("status")(inspect.status)
app.command("models")(inspect.models)
app.command("jobs")(inspect.jobs)
app.command("cancel")(inspect.cancel)
app.add_typer(dead.app, name="dead")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"streamflow {streamflow.__version__}")
        raise typer.Exit


@app.callback()
def streamflow_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Serve rectified-flow image models, and make pictures with them.

    \b
    Start everything on this machine, then ask it for a picture:
        streamflow up
        streamflow generate "a large red circle on a white background" -o circle.png
    """
