"""What a tick costs beside the network: gathering, guidance, the affine update and the books.

    python -m benchmarks.tick

Runs the built-in model with all slots in use, a mix of samplers, half of them guided, and prints for each number of
slots the median tick, the median of the network's share of it, and what is left.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.samplers import Timed
from streamflow.backends.runtime import set_threads
from streamflow.backends.torch_eager import TorchRunner
from streamflow.batching.engine import Engine
from streamflow.families import load_denoiser
from streamflow.families.base import Denoiser
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.stages.denoiser import DenoiserStage
from streamflow.types import DenoiseJob

MODEL = Path("models/shapes")
MIX = (("euler", 25), ("heun", 12), ("pseudo", 24), ("H1P20R4", 25), ("euler-sde", 25), ("perflow", 25))
WARM_TICKS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--ticks", type=int, default=15)
    arguments = parser.parse_args()

    threads = set_threads()
    open_part = partial(TorchRunner, device=torch.device("cpu"), dtype=torch.float32)
    denoiser = load_denoiser(MODEL, open_part)
    print(f"{threads} threads, torch {torch.__version__}")
    print(
        f"{'slots':>6} {'rows':>6} {'tick ms':>10} {'network ms':>12} {'rest ms':>9} {'rest %':>8} {'rest us/slot':>13}"
    )
    for slots in arguments.slots:
        rows, tick_ms, network_ms = measure(denoiser, slots, arguments.ticks)
        rest_ms = tick_ms - network_ms
        share, each = 100 * rest_ms / tick_ms, 1000 * rest_ms / slots
        print(f"{slots:>6} {rows:>6} {tick_ms:>10.2f} {network_ms:>12.2f} {rest_ms:>9.2f} {share:>8.2f} {each:>13.1f}")


def measure(denoiser: Denoiser, slots: int, ticks: int) -> tuple[int, float, float]:
    """Rows of a tick, and the medians of its milliseconds and of those that the networks take of it."""
    timed = {name: Timed(network) for name, network in denoiser.networks.items()}
    stage = DenoiserStage(Denoiser(timed, denoiser.card, denoiser.conditioning_shapes), slots=slots)
    engine = Engine(timed, capacity=slots)
    for handle, job in enumerate(jobs(stage, slots)):
        engine.admit(stage.image(job, handle=handle))
    whole, inside, rows = [], [], 0
    for _ in range(WARM_TICKS + ticks):
        before = sum(sum(seconds) for network in timed.values() for seconds in network.seconds.values())
        began = time.perf_counter()
        report = engine.tick()
        whole.append(time.perf_counter() - began)
        after = sum(sum(seconds) for network in timed.values() for seconds in network.seconds.values())
        inside.append(after - before)
        rows = report.rows
    rest = median(total - network for total, network in zip(whole[WARM_TICKS:], inside[WARM_TICKS:], strict=True))
    tick = median(whole[WARM_TICKS:])
    return rows, 1000 * tick, 1000 * (tick - rest)


def jobs(stage: DenoiserStage, count: int) -> list[DenoiseJob]:
    card, shapes = stage.card, stage._denoiser.conditioning_shapes
    rng = np.random.default_rng(0)
    texts = {role: {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for role in Role}
    return [
        DenoiseJob(texts, steps, Guidance(1.0 + seed % 2), sampler, seed, card.default_height, card.default_width)
        for seed, (sampler, steps) in enumerate(islice(cycle(MIX), count))
    ]


if __name__ == "__main__":
    main()
