"""`python -m training PHASE`: makes models/shapes, one phase after another."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from training.evaluate import RECOMMENDED_GUIDANCE, RECOMMENDED_STEPS, Setting, report
from training.figures import GateMissed, forget_figures, note, read_figures
from training.pairs import make_pairs
from training.parts import STATE_DIR

# In the order in which `all` runs them; each is a module with a `run()`.
PHASES = ("vae", "text", "tiny", "decoder", "classifier", "flow", "reflow", "refiner", "evaluate")

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def run_phase(name: str) -> None:
    """Runs one phase from its saved state where there is one."""
    note(f"{name}: started")
    importlib.import_module(f"training.{name}").run()


def _add_command(name: str) -> None:
    @app.command(name=name, help=(importlib.import_module(f"training.{name}").__doc__ or "").split("\n")[0])
    def command() -> None:
        run_phase(name)


for _name in ("skeleton", *PHASES[:-1]):
    _add_command(_name)


@app.command(name="pairs")
def pairs(backwards: bool = False) -> None:
    """Make reflow's pairs, which reflow does by itself; --backwards shares the work with it from the other end."""
    make_pairs(backwards=backwards)


@app.command(name="evaluate")
def evaluate(
    unet: str = "unet",
    steps: int = RECOMMENDED_STEPS,
    guidance_scale: float = RECOMMENDED_GUIDANCE,
    images: int = 2000,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    decoders: bool = True,
) -> None:
    """Measure the model on held-out captions."""
    report(Setting(unet, steps, guidance_scale, images), decoders=decoders, json_file=json_file)


@app.command(name="all")
def run_all(
    fresh: Annotated[bool, typer.Option(help="Forget what is finished, and train everything again.")] = False,
) -> None:
    """Run every phase that is not finished (see models/shapes/figures.json), resuming where one was stopped."""
    if fresh:
        forget_figures()
        shutil.rmtree(STATE_DIR, ignore_errors=True)
    run_phase("skeleton")
    missing = [phase for phase in PHASES if phase not in read_figures()]
    if not missing:
        print("Every phase is finished; --fresh trains everything again.")
    for phase in missing:
        run_phase(phase)


def main() -> None:
    """The command line; a missed gate is one line and exit code 1."""
    try:
        app()
    except GateMissed as missed:
        sys.exit(str(missed))


if __name__ == "__main__":
    main()
