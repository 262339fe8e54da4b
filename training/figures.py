"""What each phase reached: its gate, the record in models/shapes/figures.json and the lines of out/training/STATUS."""

from __future__ import annotations

import json
import os
from datetime import datetime
from typing import Any

from training.parts import MODEL_DIR, STATE_DIR


def read_figures() -> dict[str, dict[str, Any]]:
    """The figures of the finished phases, by phase; a phase that is not in here is still to run."""
    path = MODEL_DIR / "figures.json"
    return json.loads(path.read_text()) if path.exists() else {}


def record_figures(phase: str, figures: dict[str, Any]) -> None:
    """Adds a finished phase's figures to models/shapes/figures.json and a line to the status file."""
    merged = read_figures() | {phase: figures}
    temporary = MODEL_DIR / ".figures.tmp"
    temporary.write_text(json.dumps(merged, indent=2) + "\n")
    os.replace(temporary, MODEL_DIR / "figures.json")
    note(f"{phase}: {json.dumps(figures)}")


def forget_figures() -> None:
    """Makes every phase unfinished."""
    (MODEL_DIR / "figures.json").unlink(missing_ok=True)


def note(line: str) -> None:
    """Appends a line with the time to out/training/STATUS."""
    STATE_DIR.mkdir(parents=True, exist_ok=True)
    with (STATE_DIR / "STATUS").open("a") as status:
        status.write(f"{datetime.now():%H:%M:%S} {line}\n")


class GateMissed(RuntimeError):
    """A phase's figure is on the wrong side of its gate; the parts it wrote are kept for inspection."""


def gate(phase: str, figure_name: str, figure: float, minimum: float) -> None:
    """Prints the figure that a phase ends with, and raises GateMissed when it is below the minimum."""
    verdict = f"{phase}: {figure_name} {figure} (gate {minimum})"
    print(verdict, flush=True)
    if figure < minimum:
        note(f"GATE MISSED {verdict}")
        raise GateMissed(f"{verdict}: missed; train longer, or remove {STATE_DIR} and train again")
