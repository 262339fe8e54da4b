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
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.contestants import DIFFUSERS, RUNNING, STATIC, STEPS, Asked, Contestant, Lap, Task, chunks, run
from benchmarks.judge import Captions, Judge, make_captions
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
    measured = compare(contestants, task, list(chunks(asked, images)))
    rows = figures(measured, captions if task.model.resolve() == default_model().resolve() else None)
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


def compare(
    contestants: Sequence[Contestant], task: Task, laps: Sequence[Sequence[Asked]]
) -> dict[Contestant, list[Lap]]:
    """Every contestant's laps, each lap in another order; at the end one for what was still under way."""
    found: dict[Contestant, list[Lap]] = {contestant: [] for contestant in contestants}
    with Progress() as progress:
        loading = progress.add_task("loading", total=len(contestants))
        with _processes(contestants, task, on_loaded=lambda: progress.advance(loading)) as processes:
            running = progress.add_task("laps", total=len(contestants) * (len(laps) + 1))
            for number, lap in enumerate([*laps, ()]):
                start = number % len(contestants)
                for contestant in (*contestants[start:], *contestants[:start]):
                    processes[contestant].send(list(lap))
                    found[contestant].append(processes[contestant].recv())
                    progress.advance(running)
    return found


@contextmanager
def _processes(
    contestants: Sequence[Contestant], task: Task, *, on_loaded: Callable[[], None]
) -> Iterator[dict[Contestant, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, running = {}, []
    for contestant in contestants:
        ours[contestant], theirs = context.Pipe()
        process = context.Process(target=run, args=(contestant, task, theirs), daemon=True)
        process.start()
        # Else a contestant that dies would leave us waiting.
        theirs.close()
        running.append(process)
        # One by one: what they measure while they load, they measure alone.
        ours[contestant].recv()
        on_loaded()
    try:
        yield ours
    finally:
        for connection in ours.values():
            connection.close()
        for process in running:
            process.join()


def figures(measured: Mapping[Contestant, Sequence[Lap]], captions: Captions | None) -> list[dict[str, Any]]:
    """A row for each: medians over the laps that count, and the quality of all its pictures.

    The first and the last lap do not count; ratios and PSNR are to the first contestant.
    """
    first = next(iter(measured))
    rates = {
        contestant: [len(lap.pictures) / lap.seconds for lap in laps[1:-1]] for contestant, laps in measured.items()
    }
    reference = _pictures(measured[first])
    judge = None if captions is None else Judge(captions.wanted)
    rows = []
    for contestant, laps in measured.items():
        counted, pictures = laps[1:-1], _pictures(laps)
        pairs = zip(rates[contestant], rates[first], strict=True)
        row = vars(contestant) | {
            "images_per_s": round(median(rates[contestant]), 3),
            "ratio": round(median(ours / theirs for ours, theirs in pairs), 3),
            "latency_ms": round(1000 * median(taken for lap in counted for taken in lap.latencies_s), 1),
            "peak_mib": round(max(lap.peak_mib for lap in laps)),
            "psnr_db": None if contestant == first else psnr_db(pictures, reference),
        }
        used = [lap.energy_j / len(lap.pictures) for lap in counted if lap.energy_j is not None]
        row["joules_per_image"] = round(median(used), 2) if used else None
        if judge is not None:
            seen = torch.from_numpy(pictures).permute(0, 3, 1, 2)
            row |= judge.figures(part.float() / 127.5 - 1 for part in seen.split(64))
        rows.append(row)
    return rows


def _pictures(laps: Sequence[Lap]) -> np.ndarray:
    """Of all laps, by their numbers: uint8 [N, H, W, 3]."""
    made = {number: picture for lap in laps for number, picture in lap.pictures.items()}
    return np.stack([made[number] for number in sorted(made)])


def psnr_db(pictures: np.ndarray, reference: np.ndarray) -> float | None:
    """Over all pixels of all pictures; None where they are the same."""
    squares = [np.square(a.astype(float) - b).mean() for a, b in zip(pictures, reference, strict=True)]
    error = float(np.mean(squares))
    return round(10 * np.log10(255**2 / error), 1) if error else None


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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| way | runtime | decoder | slots | images/s | ratio | latency ms | MiB | accuracy % | Fréchet | PSNR dB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        runtime = row["backend"] + (", bf16" if row["dtype"] == "bfloat16" else "")
        accuracy = f"{100 * row['accuracy'][0]:.1f}" if "accuracy" in row else ""
        frechet = f"{row['frechet'][0]:.0f}" if "frechet" in row else ""
        psnr = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        lines.append(
            f"| {row['name']} | {runtime} | {row['decoder']} | {row['slots']} | {row['images_per_s']:.1f} "
            f"| {row['ratio']:.2f} | {row['latency_ms']:.0f} | {row['peak_mib']} | {accuracy} | {frechet} | {psnr} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
