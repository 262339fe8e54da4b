"""The command line: `streamflow up | generate | edit | samplers | status | models | jobs | cancel`."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the `streamflow` command."""
    try:
        from streamflow.cli.app import app
    except ModuleNotFoundError as error:
        from streamflow.errors import install

        sys.exit(f"streamflow: {error.name} is missing; {install('cli')}")
    except KeyboardInterrupt:
        sys.exit(130)
    app()
