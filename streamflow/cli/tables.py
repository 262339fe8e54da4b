"""Tables on the terminal, and JSON in their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

# The ids that clients make have 32 characters; longer ones would leave no room on 80 columns.
_WHOLE = 36

Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def table(*columns: str, rows: Iterable[Sequence[object]], lines: bool = False) -> Table:
    """Cells are texts of rich, or anything else as `str` gives it; `lines` are drawn between rows.

    The first column is folded last: ids stand there, which are copied.
    """
    from rich.table import Table
    from rich.text import Text

    made, rows = Table(show_lines=lines), list(rows)
    whole = all(len(str(row[0])) <= _WHOLE for row in rows)
    for number, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=whole and number == 0)
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def print_out(made: Table) -> None:
    from rich.console import Console

    Console().print(made)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
