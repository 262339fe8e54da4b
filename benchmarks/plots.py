"""Draws what was measured: docs/convergence.png from closed forms, the rest from docs/benchmarks/*.json.

    python -m benchmarks.plots

Also prints, in Markdown, the tables for docs/samplers.md.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.contestants import DIFFUSERS
from benchmarks.samplers import OUT
from streamflow.flow.programs import REFINER
from streamflow.flow.samplers import SamplerRequest, compile_sampler
from streamflow.flow.spec import FlowSpec

DOCS = Path("docs")
SERIES = {
    "euler": ("Euler", "o", "tab:gray"),
    "heun": ("Heun", "s", "tab:blue"),
    "pseudo": ("pseudo", "^", "tab:green"),
}


def main() -> None:
    convergence(DOCS / "convergence.png")
    if (OUT / "engines.json").exists():
        ways(json.loads((OUT / "engines.json").read_text()), DOCS / "engines.png")
    for path in sorted(OUT.glob("samplers_*.json")):
        measured = json.loads(path.read_text())
        over_time(measured, DOCS / f"{path.stem}.png")
        print(table(measured), "\n", compare(measured), "\n", sep="")


def convergence(path: Path) -> None:
    """The error over network evaluations on dx/dsigma = x - sin(3 sigma), whose solution is known."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for sampler, style in (("euler", "o-"), ("heun", "s-"), ("midpoint", "v-"), ("fireflow", "d-"), ("pseudo", "^-")):
        points = [error_on_closed_form(sampler, steps) for steps in (4, 8, 16, 32, 64, 128, 256)]
        evaluations, errors = zip(*points, strict=True)
        order = math.log2(errors[-2] / errors[-1])
        axes.loglog(evaluations, errors, style, markersize=4, linewidth=1, label=f"{sampler}: order {order:.2f}")
    axes.set(xlabel="network evaluations", ylabel="error at sigma 0")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    save(figure, path)


def error_on_closed_form(sampler: str, steps: int) -> tuple[int, float]:
    """Network evaluations, and the error of the program against the solution."""

    def particular(sigma: float) -> float:
        return (math.sin(3 * sigma) + 3 * math.cos(3 * sigma)) / 10

    exact = (1.0 - particular(1.0)) / math.e + particular(0.0)
    program = compile_sampler(sampler, SamplerRequest(steps), FlowSpec(evaluates_data=True))
    x, c = 1.0, 1.0
    for op in program.ops:
        y = op.i_x * x + op.i_c * c
        o = y - math.sin(3 * op.timestep / 1000)
        x, c = op.p_x * x + op.p_c * c + op.p_o * o, op.g_c * c + op.g_o * o
    return len(program), abs(x - exact)


def over_time(measured: dict[str, Any], path: Path) -> None:
    """Error, accuracy and Fréchet distance over network time, with their intervals."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5))
    figures = (("error", "relative error of the latents"), ("accuracy", "attribute accuracy"), ("frechet", "Fréchet"))
    for axes, (name, label) in zip(panels, figures, strict=True):
        for rows, (title, marker, color) in series(measured["rows"]):
            middle, low, high = (np.array([row[name][k] for row in rows]) for k in range(3))
            times = [row["network_ms"] for row in rows]
            line = "-" if title != "with refiner" else ""
            bars = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
            axes.errorbar(times, middle, bars, marker=marker, color=color, linestyle=line, label=title, capsize=2)
            if title == "with refiner" and name == "error":
                for row, x, y in zip(rows, times, middle, strict=True):
                    axes.annotate(row["sampler"], (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set(xscale="log", xlabel="network ms per image", ylabel=label)
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].legend()
    figure.suptitle(
        f"{measured['unet']}, guidance {measured['guidance_scale']:g}, {measured['images']} images, "
        f"{measured['threads']} CPU threads"
    )
    save(figure, path)


def series(rows: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], tuple[str, str, str]]]:
    plain = [([row for row in rows if row["sampler"] == name], style) for name, style in SERIES.items()]
    return [*plain, ([row for row in rows if row["rows"][REFINER]], ("with refiner", "*", "tab:red"))]


def ways(measured: dict[str, Any], path: Path) -> None:
    """Images per second of every way, and how many times the diffusers pipeline's that is."""
    rows = measured["rows"][::-1]
    figure, axes = plt.subplots(figsize=(10, 0.34 * len(rows) + 1.2))
    for place, row in enumerate(rows):
        ours = row["name"] == "running batch" and row["backend"] != "torch"
        color = "tab:red" if ours else "tab:blue" if row["way"] != DIFFUSERS else "tab:gray"
        axes.barh(place, row["images_per_s"], color=color, alpha=1 if row["decoder"] == "tiny" else 0.6)
        axes.annotate(
            f"{row['images_per_s']:.1f}   ({row['ratio']:.2f}x)",
            (row["images_per_s"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    names = [
        f"{row['name']}, {row['backend']}{' bf16' if row['dtype'] == 'bfloat16' else ''}, {row['decoder']} decoder"
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xlim(0, 1.15 * max(row["images_per_s"] for row in rows))
    axes.set_xlabel("images per second, and in brackets how many times the first line's")
    axes.set_title(f"{measured['steps']} steps, on {measured['cores']} cores of {measured['processor']}", fontsize=9)
    save(figure, path)


def table(measured: dict[str, Any]) -> str:
    lines = [
        f"`{measured['unet']}`, guidance {measured['guidance_scale']:g}; a row of the base network takes "
        f"{measured['row_ms']['base']} ms, one of the refiner {measured['row_ms']['refiner']} ms.",
        "",
        "| sampler | steps | rows base + refiner | network ms | error % | accuracy % | Fréchet |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(measured["rows"], key=lambda row: row["network_ms"]):
        error, accuracy, frechet = (row[name] for name in ("error", "accuracy", "frechet"))
        lines.append(
            f"| `{row['sampler']}` | {row['steps']} | {row['rows']['base']} + {row['rows']['refiner']} "
            f"| {row['network_ms']:.1f} | {_interval(error, 100, 2)} | {_interval(accuracy, 100, 1)} "
            f"| {_interval(frechet, 1, 0)} |"
        )
    return "\n".join(lines)


def compare(measured: dict[str, Any]) -> str:
    """Each configuration with a refiner: its time beside that of Euler, Heun and pseudo at the same error."""
    lines = ["| sampler | network ms | Euler at equal error | Heun at equal error | pseudo at equal error |"]
    lines.append("|---|--:|--:|--:|--:|")
    for row in measured["rows"]:
        if row["sampler"] in ("euler", "heun"):
            continue
        name = row["sampler"] if row["sampler"] != "pseudo" else f"pseudo, {row['steps']} steps"
        times = [time_at(measured["rows"], other, row["error"][0]) for other in SERIES]
        cells = [f"{time:.1f} ({row['network_ms'] / time - 1:+.0%})" if time else "beyond the table" for time in times]
        lines.append(f"| `{name}` | {row['network_ms']:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def time_at(rows: list[dict[str, Any]], sampler: str, error: float) -> float | None:
    """Network time at which a sampler has this error, between its measured points on log axes."""
    points = sorted((row["error"][0], row["network_ms"]) for row in rows if row["sampler"] == sampler)
    errors, times = zip(*points, strict=True)
    if not errors[0] <= error <= errors[-1]:
        return None
    return float(np.exp(np.interp(np.log(error), np.log(errors), np.log(times))))


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def _interval(values: list[float], factor: float, digits: int) -> str:
    middle, low, high = (f"{factor * value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
