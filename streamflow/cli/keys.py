"""`streamflow keys create | list | revoke`: who may call a deployment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.tables import Json, print_json, print_out, table

if TYPE_CHECKING:
    from streamflow.cli.key_lines import Line

app = typer.Typer(
    name="keys",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, list and revoke the API keys of a deployment.\n\n"
    "The file holds the keys' hashes, never the keys. Gateways and stages that were started with it (--api-keys-file, "
    "STREAMFLOW_API_KEYS_FILE) read it again within seconds after a change. To exchange a key without a gap make a "
    "second one, give it to its users, and revoke the first.",
)

KeysFile = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="The file of keys [STREAMFLOW_API_KEYS_FILE, keys.txt]."),
]


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key: 1 to 40 of A-Z a-z 0-9 . _ -")],
    jobs: Annotated[
        int | None, typer.Option(min=0, help="Unfinished jobs of the tenant at once; 0 = as many as of all.")
    ] = None,
    images_per_minute: Annotated[
        float | None, typer.Option(min=0, help="Images that the tenant may ask for in a minute; 0 = any number.")
    ] = None,
    operator: Annotated[
        bool, typer.Option("--operator", help="It may also see the stages of a deployment, and call and drain them.")
    ] = False,
    file: KeysFile = None,
) -> None:
    """Make a key, print it once, and append its hash to the file.

    What a tenant may have is the same for all of its keys: a second key has what the first one has, and an option that
    is given holds for both. Without one it is what the gateway gives every tenant (--max-tenant-jobs,
    --tenant-images-per-minute).

    \b
    Examples:
        streamflow keys create alice
        streamflow keys create alice --jobs 4 --images-per-minute 30 --file /etc/streamflow/keys.txt
        streamflow keys create ops --operator > ops.key
    """
    from streamflow.cli.key_lines import add, alone, read, write

    path = _path(file)
    with alone(path):
        key, lines = add(
            read(path, missing_ok=True), tenant, jobs=jobs, images_per_minute=images_per_minute, operator=operator
        )
        write(path, lines)
    typer.echo(f"a key of {tenant}, which is shown this once; its hash is in {path}", err=True)
    typer.echo(key)


@app.command("list")
def list_keys(file: KeysFile = None, json: Json = False) -> None:
    """List the keys of a file, by the beginnings of their hashes, and say where servers would refuse it.

    \b
    Examples:
        streamflow keys list
        streamflow keys list --json --file /etc/streamflow/keys.txt
    """
    from streamflow.cli.key_lines import check, read

    path = _path(file)
    lines = read(path)
    found = [line for line in lines if line.key is not None]
    if json:
        print_json([_about(line) for line in found])
    elif not found:
        typer.echo("no keys")
    else:
        columns = ("id", "tenant", "operator", "jobs", "images_per_minute")
        rows = [tuple(_shown(_about(line)[column]) for column in columns) for line in found]
        print_out(table("id", "tenant", "operator", "jobs", "images/minute", rows=rows))
    if found:
        check(path, lines)


@app.command()
def revoke(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids from `streamflow keys list`.")],
    file: KeysFile = None,
) -> None:
    """Take keys out of the file: calls that begin later are refused.

    \b
    Examples:
        streamflow keys revoke 2c26b46b68ff
    """
    from streamflow.cli.key_lines import alone, read, remove, write

    path = _path(file)
    with alone(path):
        write(path, remove(read(path), ids))
    for id_ in ids:
        typer.echo(f"{id_}: revoked")


def _path(file: Path | None) -> Path:
    from streamflow.config import ClientSettings

    path = file or ClientSettings().api_keys_file or Path("keys.txt")
    # A file is replaced whole: a link would be in place of its target, which servers may know by another name.
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _about(line: Line) -> dict[str, object]:
    assert line.key is not None
    caller = line.key.caller
    return {
        "id": line.key.id,
        "tenant": caller.tenant,
        "operator": caller.operator,
        "jobs": caller.quota.jobs,
        "images_per_minute": caller.quota.images_per_minute,
    }


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)
