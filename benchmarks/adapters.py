"""What LoRA adapters cost: merged into the weights, as it is served, or added in every call, as peft does.

    python -m benchmarks.adapters

On the built-in model's UNet, with adapters of random weights in all attention layers and convolutions of its blocks:
milliseconds of a call (medians of interleaved repeats), of merging, and of a tick whose images have several mixes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from streamflow.backends.cost import measure
from streamflow.backends.runtime import set_threads
from streamflow.backends.torch_eager import TorchRunner
from streamflow.families import parts
from streamflow.families.adapters import Adapted, AdapterFiles
from streamflow.families.libraries import from_diffusers
from streamflow.types import AdapterUse
from tests.checkpoints.extras import UNET_LAYERS, save_adapter

MODEL = Path("models/shapes")
ROWS, SLOTS, MIXES = (1, 4, 16), 16, (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    print(f"{set_threads()} threads, torch {torch.__version__}, rank {arguments.rank}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        compare(Path(folder), arguments.rank, arguments.repeats)


def compare(folder: Path, rank: int, repeats: int) -> None:
    part = next(part for part in parts(MODEL) if part.name == "unet")
    plain = TorchRunner(part, device=torch.device("cpu"), dtype=torch.float32)
    file = folder / "adapter.safetensors"
    with torch.inference_mode(mode=False):
        pipeline = from_diffusers("StableDiffusionPipeline").from_pretrained(MODEL)
        save_adapter(pipeline, file, network="unet", layers=UNET_LAYERS, rank=rank)
        at_run_time = from_diffusers("StableDiffusionPipeline").from_pretrained(MODEL)
        at_run_time.load_lora_weights(folder, weight_name=file.name, adapter_name="one")
        layers = AdapterFiles("sd", {"one": file}).into("unet", plain.module)
    adapted = Adapted(plain.module, layers)
    merging_s = median(_timed(partial(adapted, [AdapterUse("one", 0.1 * k)])) for k in range(1, 8))
    merged = plain.using(adapted([AdapterUse("one")]))
    runners = {"plain": plain, "merged": merged, "added in every call": plain.using(at_run_time.unet)}
    changed = sum(plain.module.get_submodule(path).weight.numel() for path in layers["one"])
    held = sum(weights.numel() for weights in plain.module.parameters())
    print(f"merging a mix: {1000 * merging_s:.1f} ms; it holds {100 * changed / held:.0f} % of the weights once more")
    examples = {rows: part.example(rows) for rows in (*ROWS, *(SLOTS // mixes for mixes in MIXES))}
    kinds = [(name, rows) for rows in ROWS for name in runners]
    seconds = measure(lambda kind: _run(runners[kind[0]], examples[kind[1]]), kinds, repeats=repeats)
    print(f"{'rows':>6}" + "".join(f"{name + ' ms':>24}" for name in runners))
    for rows in ROWS:
        print(f"{rows:>6}" + "".join(f"{1000 * seconds[name, rows]:>24.1f}" for name in runners))

    def tick(mixes: int) -> None:
        for _ in range(mixes):
            _run(merged, examples[SLOTS // mixes])

    ticks = measure(tick, MIXES, repeats=repeats)
    for mixes in MIXES:
        print(f"{SLOTS} images with {mixes} mixes, a call for each: {1000 * ticks[mixes]:.1f} ms")


def _run(runner: TorchRunner, inputs: dict[str, Tensor]) -> None:
    runner(inputs)


def _timed(call: partial[object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
