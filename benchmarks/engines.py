"""Images per second of the diffusers pipeline, of the paper's ways to batch and of ours, on the same weights.

    python -m benchmarks.engines
    python -m benchmarks.engines --quick --json engines.json

Text to picture (pixels, no file), 4 Euler steps, guidance 1, at the model's default size, with more asked for than can
be made at once. Every contestant has a process of its own; they make the same pictures in turns, lap by lap, so that
what else the machine does hits all of them. Figures are medians over laps. Beside the speed: what the built-in model's
classifier sees in the pictures, and their PSNR to those of the first row. `benchmarks.plots` draws from the JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.contestants import DIFFUSERS, RUNNING, STATIC, STEPS, Asked, Contestant, Task, chunks
from benchmarks.judge import Judge, make_captions
from benchmarks.race import compare, figures, table
from streamflow.backends.graphs import GraphStore
from streamflow.backends.open_vino import has_bfloat16
from streamflow.backends.runtime import available_cores, processor_name
from streamflow.config import default_engines, default_model
from streamflow.families import parts

SLOTS = 16

PAPER_ROWS, PAPER_STAGES = "the paper's single-row calls", "the paper's N stages"

ON_CPU = (
    Contestant("diffusers, one by one", DIFFUSERS),
    Contestant("diffusers, one by one", DIFFUSERS, "tiny"),
    Contestant("diffusers, batches", DIFFUSERS, slots=SLOTS),
    Contestant("ours, one by one", STATIC),
    Contestant("running batch", RUNNING, slots=SLOTS),
    Contestant("ours, one by one", STATIC, backend="onnxruntime"),
    Contestant("static batches", STATIC, backend="onnxruntime", slots=SLOTS),
    Contestant(PAPER_ROWS, RUNNING, backend="onnxruntime", slots=SLOTS, single_rows=True),
    Contestant(PAPER_STAGES, RUNNING, backend="onnxruntime", slots=STEPS),
    Contestant("running batch", RUNNING, backend="onnxruntime", slots=SLOTS),
    Contestant(PAPER_ROWS, RUNNING, "tiny", "onnxruntime", slots=SLOTS, single_rows=True),
    Contestant(PAPER_STAGES, RUNNING, "tiny", "onnxruntime", slots=STEPS),
    Contestant("running batch", RUNNING, "tiny", "onnxruntime", slots=SLOTS),
    Contestant("ours, one by one", STATIC, backend="openvino"),
    Contestant("running batch", RUNNING, backend="openvino", slots=SLOTS),
    Contestant("running batch", RUNNING, "tiny", "openvino", slots=SLOTS),
)
IN_BFLOAT16 = (
    Contestant("running batch", RUNNING, "full", "openvino", "bfloat16", slots=SLOTS),
    Contestant("running batch", RUNNING, "tiny", "openvino", "bfloat16", slots=SLOTS),
)
"""On processors that have it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_model(), help="checkpoint folder in diffusers layout")
    parser.add_argument("--engines", type=Path, default=default_engines(), help="where graphs are, or are put")
    parser.add_argument("--images", type=int, default=64, help="in each lap")
    parser.add_argument("--laps", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 laps of 16 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    arguments = parser.parse_args()
    if arguments.images < SLOTS:
        parser.error(f"--images: got {arguments.images}; allowed: {SLOTS} or more, which the running batch holds")
    images, laps = (16, 3) if arguments.quick else (arguments.images, arguments.laps)

    task = Task(arguments.model, arguments.engines)
    for part in parts(task.model):
        GraphStore(task.engines).make(part)
    # The first lap warms up, and fills the running batches.
    captions = make_captions(images * (laps + 1))
    asked = [Asked(number, prompt) for number, prompt in enumerate(captions.prompts)]
    contestants = (*ON_CPU, *IN_BFLOAT16) if has_bfloat16() else ON_CPU
    with Progress() as bars:
        shown = {name: bars.add_task(name, total=None) for name in ("loading", "laps")}
        measured = compare(
            contestants,
            task,
            list(chunks(asked, images)),
            lambda name, done, total: bars.update(shown[name], completed=done, total=total),
        )
    # Its classifier knows the built-in model's pictures only.
    judge = Judge(captions.wanted) if task.model.resolve() == default_model().resolve() else None
    rows = figures(measured, judge)
    print(table(rows))
    shares = told_apart(rows)
    print("\n" + "\n".join(f"{name}: {share:.2f}x" for name, share in shares.items()))
    about = {
        "model": task.model.name,
        "steps": STEPS,
        "guidance_scale": 1.0,
        "images_per_lap": images,
        "laps": laps,
        "cores": available_cores(),
        "processor": processor_name(torch.device("cpu")),
        "torch": torch.__version__,
        "ratio_to_diffusers": max(row["ratio"] for row in rows),
        "ratio_to_diffusers_float32": max(row["ratio"] for row in rows if row["dtype"] == "float32"),
        "shares": shares,
        "rows": rows,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")
        print(arguments.json)


def told_apart(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What each change brings on the way from the diffusers pipeline to our fastest: ratios of neighbours."""

    def rate(**wanted: Any) -> float:
        found = [row["images_per_s"] for row in rows if all(row[name] == value for name, value in wanted.items())]
        return float(max(found, default=0.0))

    fastest = max((row for row in rows if row["dtype"] == "float32"), key=lambda row: row["images_per_s"])
    runtime = fastest["backend"]
    way = {
        "": rate(way=DIFFUSERS, decoder="full", slots=1),
        "own pipeline": rate(way=STATIC, backend="torch", slots=1),
        f"{runtime} for torch": rate(way=STATIC, backend=runtime, slots=1),
        f"running batch of {SLOTS}": rate(name="running batch", decoder="full", backend=runtime, dtype="float32"),
        "tiny decoder": rate(name="running batch", decoder="tiny", backend=runtime, dtype="float32"),
        "bfloat16": rate(name="running batch", decoder="tiny", dtype="bfloat16"),
    }
    steps = {name: value for name, value in way.items() if value}
    return {name: round(after / before, 3) for (_, before), (name, after) in pairwise(steps.items())}


if __name__ == "__main__":
    main()
