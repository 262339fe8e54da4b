"""Contestants side by side: their laps in turns, and what comes out of them as figures and a table."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.contestants import Asked, Contestant, Lap, Task, run

if TYPE_CHECKING:
    from benchmarks.judge import Judge

OnProgress = Callable[[str, int, int], None]
"""Called with (what is done, how often it was, how often it will be)."""


def compare(
    contestants: Sequence[Contestant], task: Task, laps: Sequence[Sequence[Asked]], on_progress: OnProgress
) -> dict[Contestant, list[Lap]]:
    """Every contestant's laps, each lap in another order; at the end one for what was still under way."""
    found: dict[Contestant, list[Lap]] = {contestant: [] for contestant in contestants}
    count, total = len(contestants), len(contestants) * (len(laps) + 1)
    with _processes(contestants, task, on_loaded=lambda done: on_progress("loading", done, count)) as processes:
        for number, lap in enumerate([*laps, ()]):
            start = number % count
            for place, contestant in enumerate((*contestants[start:], *contestants[:start])):
                processes[contestant].send(list(lap))
                found[contestant].append(processes[contestant].recv())
                on_progress("laps", number * count + place + 1, total)
    return found


@contextmanager
def _processes(
    contestants: Sequence[Contestant], task: Task, *, on_loaded: Callable[[int], None]
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
        on_loaded(len(running))
    try:
        yield ours
    finally:
        for connection in ours.values():
            connection.close()
        for process in running:
            process.join()


def figures(measured: Mapping[Contestant, Sequence[Lap]], judge: Judge | None) -> list[dict[str, Any]]:
    """A row for each: medians over the laps that count, and the quality of all its pictures.

    The first and the last lap do not count; ratios and PSNR are to the first contestant.

    Args:
        judge: of the pictures, by their numbers.
    """
    first = next(iter(measured))
    rates = {
        contestant: [len(lap.pictures) / lap.seconds for lap in laps[1:-1]] for contestant, laps in measured.items()
    }
    reference = _pictures(measured[first])
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
