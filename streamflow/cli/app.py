"""The commands, put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import streamflow
from streamflow.cli import dead, edit, engine, generate, inspect, keys, redis_acl, samplers, top, up
from streamflow.errors import (
    AlreadyExistsError,
    BusyError,
    DeadlineError,
    InvalidRequestError,
    StreamFlowError,
    UnavailableError,
    install,
)

_FAILED, _BAD_INPUT, _TRY_AGAIN = 1, 2, 3
_OURS = ("streamflow", "gateway", "services")


class _OneLineErrors(TyperGroup):
    """What goes wrong on purpose is one line on stderr, and an exit code that says whose turn it is."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (StreamFlowError, OSError) as error:
            typer.echo(f"streamflow: {error}", err=True)
            raise typer.Exit(_exit_code(error)) from None
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in _OURS:
                raise
            # The command line alone is a small part of what there is to install.
            needs = f"it needs what the services need, and {error.name} is missing; {install('serve')}"
            typer.echo(f"streamflow: {needs}", err=True)
            raise typer.Exit(_FAILED) from None


def _exit_code(error: StreamFlowError | OSError) -> int:
    match error:
        case InvalidRequestError() | AlreadyExistsError():
            return _BAD_INPUT
        case UnavailableError() | BusyError() | DeadlineError():
            return _TRY_AGAIN
        case _:
            return _FAILED


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
app.command("top")(top.top)
app.command("models")(inspect.models)
app.command("jobs")(inspect.jobs)
app.command("cancel")(inspect.cancel)
app.add_typer(dead.app, name="dead")
app.add_typer(engine.app, name="engine")
app.add_typer(keys.app, name="keys")
app.command("redis-acl")(redis_acl.redis_acl)


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

    \b
    Exit codes: 0 done; 1 failed; 2 what was given cannot be used; 3 unreachable, busy or out of time: try again later.
    """
