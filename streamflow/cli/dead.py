"""`streamflow dead list | show | retry`: requests that were given up."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.connection import Address, ApiKey, Tls, TlsCa, connect
from streamflow.cli.tables import Json, print_json, print_out, table
from streamflow.errors import NotFoundError

if TYPE_CHECKING:
    from streamflow.client import Client
    from streamflow.client.views import DeadLetter

app = typer.Typer(
    name="dead",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at requests that were given up, and try them again.\n\n"
    "An image on which a stage fails or dies in every attempt ends its request with an error, so that it cannot take "
    "others with it. What it was is kept for a week.",
)

_MOST = 1000


@app.command("list")
def list_letters(
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=_MOST, help="How many, the newest first.")] = 20,
    json: Json = False,
) -> None:
    """List what was given up, the newest first.

    \b
    Examples:
        streamflow dead list
        streamflow dead list --json
    """
    with connect(address, api_key, tls, tls_ca) as client:
        found = client.dead_letters(limit=limit)
    if json:
        print_json([asdict(letter) for letter in found])
    elif not found:
        typer.echo("nothing was given up")
    else:
        rows = [(one.id, _when(one), f"{one.request_id} image {one.index}", one.service, one.reason) for one in found]
        print_out(table("id", "when", "request", "stage", "why", rows=rows))


@app.command()
def show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="An id from `streamflow dead list`.")],
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    json: Json = False,
) -> None:
    """Show one of them with its request.

    \b
    Examples:
        streamflow dead show 1700000000000-0
    """
    with connect(address, api_key, tls, tls_ca) as client:
        letter = _find(client, letter_id)
    if json:
        print_json(asdict(letter))
        return
    about = {
        "when": _when(letter),
        "request": f"{letter.request_id}, image {letter.index}",
        "stage": f"{letter.service}, {letter.attempts} attempts",
        "why": letter.reason,
        "model": letter.model,
        "prompts": "\n".join(letter.prompts),
        "seed": letter.seed,
        "steps": letter.steps,
        "sampler": letter.sampler,
    }
    print_out(table("id", letter.id, rows=about.items()))


@app.command()
def retry(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids from `streamflow dead list`.")],
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """Submit requests once more, as jobs of their own.

    \b
    Examples:
        streamflow dead retry 1700000000000-0
    """
    with connect(address, api_key, tls, tls_ca) as client:
        for letter_id in ids:
            job = client.retry(letter_id)
            typer.echo(f"{letter_id}: submitted as {job.request_id}")


def _find(client: Client, letter_id: str) -> DeadLetter:
    for letter in client.dead_letters(limit=_MOST):
        if letter.id == letter_id:
            return letter
    raise NotFoundError(f"no dead letter {letter_id!r}; `streamflow dead list` shows what there is")


def _when(letter: DeadLetter) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at_s))
