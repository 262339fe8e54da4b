"""`streamflow redis-acl`: users of Redis with the least rights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def redis_acl(
    deployment: Annotated[
        str | None, typer.Option(help="Name of the deployment [STREAMFLOW_DEPLOYMENT, default].")
    ] = None,
    more_model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further model of its gateway (--more-models).")
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", "-d", metavar="FOLDER", help="Where the files go; it is made if need be.")
    ] = Path("redis-acl"),
    only: Annotated[
        bool, typer.Option("--only", help="Drop the users of other deployments and models that the file has.")
    ] = False,
) -> None:
    """Write a file of users for Redis, and a password for each of them.

    A gateway, an encoder, a denoiser and a decoder may each run the commands that they use, on the keys and channels of
    their deployment; the stages of a further model on those of theirs. `administrator` may do everything, for people,
    and the default user nothing. Passwords that are in the folder already stay; delete one to have it exchanged.

    users.acl holds hashes of the passwords. Let Redis read it (`aclfile /path/users.acl` in redis.conf, `ACL LOAD`
    after a change), and each process its own password: --redis-url redis://USER@HOST:6379/0 --redis-password-file FILE.

    Users of other deployments and models that are in the file stay in it, with their passwords of before and what they
    may do in this version. So one Redis serves several deployments when the command was run for each of them with the
    same folder.

    \b
    Examples:
        streamflow redis-acl --dir secrets
        streamflow redis-acl --deployment pictures --more-model sd15 --dir secrets
    """
    from streamflow.cli.acl_files import USERS_FILE, users_of, write
    from streamflow.config import NameSettings

    users = users_of(deployment or NameSettings().deployment, more_model or [])
    kept = write(directory, users, only=only)
    typer.echo(f"{directory / USERS_FILE}: for `aclfile` of redis.conf; the passwords lie beside it", err=True)
    if kept:
        typer.echo(f"these were there already, and stay (--only drops them): {', '.join(kept)}", err=True)
    for user in users:
        typer.echo(f"redis://{user.name}@HOST:6379/0  {directory / user.password_file}")
