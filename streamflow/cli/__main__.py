"""`python -m streamflow.cli` is the `streamflow` command."""

from streamflow.cli import main

main()
