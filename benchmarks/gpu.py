"""The benchmarks that need a GPU, on networks of real models' shapes that it makes itself.

    make gpu-bench
    python3 -m benchmarks.gpu --json gpu.json

First the networks alone (SD 1.5, SD3, FLUX): what a call costs by its rows, and what different timesteps in its rows
cost. Then pictures: the contestants of `benchmarks.engines` on a checkpoint of SD 1.5's shape, by size, from text and
from a picture. Needs python3 with torch, diffusers and transformers; with TensorRT engines are built and compared too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contestants import DIFFUSERS, RUNNING, STATIC, STEPS, Asked, Contestant, Task, chunks
from benchmarks.race import compare, figures, table
from benchmarks.shapes import SHAPES, save_sd15
from streamflow.backends.cost import fit, measure
from streamflow.batching.compiled import cuda_graph

Call = Callable[[], Any]

SIZES_PX = (64, 128, 256, 512, 768, 1024)
ROWS = (1, 2, 4, 8, 16)
SLOTS = 16

_HALF = partial(Contestant, dtype="float16")
ON_GPU = (
    _HALF("diffusers, one by one", DIFFUSERS),
    _HALF("diffusers, one by one", DIFFUSERS, "tiny"),
    _HALF("diffusers, batches", DIFFUSERS, slots=SLOTS),
    _HALF("ours, one by one", STATIC),
    _HALF("static batches", STATIC, slots=SLOTS),
    _HALF("the paper's single-row calls", RUNNING, slots=SLOTS, single_rows=True),
    _HALF("the paper's N stages", RUNNING, slots=STEPS),
    _HALF("running batch", RUNNING, slots=SLOTS),
    _HALF("running batch", RUNNING, "tiny", slots=SLOTS),
    _HALF("running batch, compiled", RUNNING, "tiny", slots=SLOTS, compiled=True),
)
ON_TENSORRT = (
    _HALF("ours, one by one", STATIC, backend="tensorrt"),
    _HALF("the paper's single-row calls", RUNNING, backend="tensorrt", slots=SLOTS, single_rows=True),
    _HALF("running batch", RUNNING, backend="tensorrt", slots=SLOTS),
    _HALF("running batch", RUNNING, "tiny", "tensorrt", slots=SLOTS),
)
"""Where the library is installed; each builds the engines that it needs while it loads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_PX, metavar="PX")
    parser.add_argument("--networks", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--images", type=int, default=64, help="in each lap")
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a hundredth of the network, to try this on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, as they come")
    arguments = parser.parse_args()
    if arguments.images < SLOTS:
        parser.error(f"--images: got {arguments.images}; allowed: {SLOTS} or more, which the running batch holds")
    device = torch.device(arguments.device)
    said: dict[str, Any] = {"card": card(device), "torch": torch.__version__, "networks": [], "pictures": []}

    def tell(kind: str, figure: Mapping[str, Any]) -> None:
        said[kind].append(figure)
        print(json.dumps(figure), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(said, indent=1) + "\n")

    for name in arguments.networks:
        for figure in network_costs(name, arguments.sizes, device):
            tell("networks", figure)
    row_tflop = {one["size_px"]: one["row_tflop"] for one in said["networks"] if one["network"] == "sd15"}
    with tempfile.TemporaryDirectory() as folder:
        model = save_sd15(Path(folder) / "sd15", small=arguments.small)
        base = Task(model, Path(folder) / "engines", str(device))
        contestants: Sequence[Contestant] = ON_GPU
        if device.type != "cuda":
            contestants = [replace(one, dtype="float32") for one in ON_GPU]
        elif find_spec("tensorrt") is not None:
            contestants = (*ON_GPU, *ON_TENSORRT)
        for size_px in arguments.sizes:
            for strength in (0.0, 0.5):
                task = replace(base, size_px=size_px, strength=strength)
                for row in pictures(contestants, task, arguments.images, arguments.laps):
                    # Of the network alone: text encoder and decoder come on top.
                    tflops = row["images_per_s"] * STEPS * (1 - strength) * row_tflop.get(size_px, 0)
                    tell("pictures", {"size_px": size_px, "strength": strength, "network_tflops": tflops} | row)


def card(device: torch.device) -> dict[str, Any]:
    """Its name, and the TFLOP/s of a large float16 matrix product on it."""
    if device.type != "cuda":
        return {"name": "cpu"}
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.float16)

    def product(count: int) -> None:
        for _ in range(count):
            matrix @ matrix
        torch.cuda.synchronize(device)

    seconds = measure(product, [10])[10]
    return {"name": torch.cuda.get_device_name(device), "matmul_tflops": round(10 * 2 * 8192**3 / seconds / 1e12, 1)}


@torch.inference_mode()
def network_costs(name: str, sizes_px: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """For each size: the fit of a call's cost in eager torch and as a CUDA graph, its arithmetic, mixed timesteps."""
    shape = SHAPES[name]
    dtype = torch.bfloat16 if name == "flux" else torch.float16
    network = shape.load(device, dtype)
    found = []
    for size_px in sizes_px:
        inputs = {rows: dict(shape.inputs(rows, size_px, device, dtype)) for rows in ROWS}
        with FlopCounterMode(display=False) as counter:
            network(**inputs[1])

        figure: dict[str, Any] = {"network": name, "size_px": size_px, "row_tflop": counter.get_total_flops() / 1e12}
        calls: dict[int, Call] = {rows: partial(_output, network, inputs[rows]) for rows in ROWS}
        figure["eager"] = _costs(_measured(calls, device))
        if device.type == "cuda":
            graphs: dict[int, Call] = {rows: cuda_graph(call) for rows, call in calls.items()}
            figure["graph"] = _costs(_measured(graphs, device))
        mixed = inputs[ROWS[-1]]
        equal = mixed | {"timestep": torch.full_like(mixed["timestep"], 0.5)}
        times = _measured(dict(enumerate(partial(_output, network, one) for one in (equal, mixed))), device)
        figure["mixed_over_equal"] = round(times[1] / times[0], 4)
        found.append(figure)
    return found


def pictures(contestants: Sequence[Contestant], task: Task, images: int, laps: int) -> list[dict[str, Any]]:
    asked = [Asked(number, f"picture {number}") for number in range(images * (laps + 1))]
    rows = figures(compare(contestants, task, list(chunks(asked, images)), _tell), None)
    print(table(rows), flush=True)
    return rows


def _tell(what: str, done: int, total: int) -> None:
    print(f"\r{what}: {done} of {total}  ", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _output(network: Any, inputs: Mapping[str, Any]) -> Any:
    return network(**inputs, return_dict=False)[0]


def _measured(calls: Mapping[int, Call], device: torch.device) -> dict[int, float]:
    def call(key: int) -> None:
        calls[key]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return measure(call, list(calls), repeats=9)


def _costs(seconds: Mapping[int, float]) -> dict[str, Any]:
    cost = fit(seconds)
    return {
        "c0_ms": round(1000 * cost.c0_s, 3),
        "c1_ms": round(1000 * cost.c1_s, 3),
        "ms": {rows: round(1000 * taken, 3) for rows, taken in seconds.items()},
    }


if __name__ == "__main__":
    main()
