"""Samplers against each other on the built-in model: error, accuracy and Fréchet distance over network time.

    python -m benchmarks.samplers --unet unet_base --guidance-scale 2
    python -m benchmarks.samplers

Every sampler starts from the same noises and captions. The error is that of the latents to those of a 200-step solution
of second order. Network time is what the sampler's rows cost at the median time of a full call, measured in the same
run. Intervals are bootstrapped over the images, 95 %. Writes docs/benchmarks/samplers_<unet>.json; `benchmarks.plots`
draws from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks import judge
from streamflow.backends.base import Network
from streamflow.backends.runtime import set_threads
from streamflow.backends.torch_eager import TorchRunner
from streamflow.families import load_denoiser
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import BASE, REFINER, Role
from streamflow.flow.samplers import sampler_steps
from streamflow.stages.denoiser import DenoiserStage
from streamflow.types import DenoiseJob
from training.parts import MODEL_DIR, load_text, load_vae
from training.pool import embed_all
from training.sampling import decode
from training.text import tokenize

OUT = Path("docs/benchmarks")
REFERENCE = ("pseudo", 200)
NAMED = (
    *(("euler", steps) for steps in (1, 2, 4, 8, 25)),
    *(("heun", steps) for steps in (2, 4, 6, 8, 12)),
    *(("pseudo", steps) for steps in (2, 4, 6, 8, 12, 16)),
)
BLOCKS = ("H1P1R2", "H1P2R1", "H1P2R2", "H1P3R2", "H1P5R2", "H1P5R3", "H2P4R2", "H1P7R4", "H1P9R2", "H5R3")


@dataclass(frozen=True)
class Cases:
    """Held-out captions: embeddings float32 [N, 32, 128], of the empty prompt [32, 128], and the scenes' labels."""

    embeddings: np.ndarray
    empty: np.ndarray
    wanted: Tensor

    def jobs(self, sampler: str, steps: int, guidance_scale: float, size_px: int) -> list[DenoiseJob]:
        empty = {"prompt_embeds": self.empty}
        return [
            DenoiseJob(
                {Role.TARGET: {"prompt_embeds": told}, Role.NEGATIVE: empty},
                steps,
                Guidance(guidance_scale),
                sampler,
                seed=seed,
                height=size_px,
                width=size_px,
            )
            for seed, told in enumerate(self.embeddings)
        ]


class Timed:
    """A network that notes how long its calls take, by their rows."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.name, self.row_counts = network.name, network.row_counts
        self.row_invariant, self.takes_velocity = network.row_invariant, network.takes_velocity
        self.guided_channels = network.guided_channels
        self.seconds: dict[int, list[float]] = defaultdict(list)

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        began = time.perf_counter()
        output = self._network(latents, timestep, conditioning)
        self.seconds[len(latents)].append(time.perf_counter() - began)
        return output

    @property
    def row_ms(self) -> float:
        """Milliseconds of a row, at the median of the largest calls."""
        rows = max(self.seconds)
        return 1000 * median(self.seconds[rows]) / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", default="unet", help="unet (reflowed) or unet_base (before)")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--slots", type=int, default=32)
    arguments = parser.parse_args()

    threads = set_threads()
    cases = make_cases(arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        stage, networks = load(variant(arguments.unet, Path(folder)), arguments.slots)
        figures = Judge(cases).figures
        size_px = stage.card.default_height

        def run(sampler: str, steps: int) -> np.ndarray:
            return np.stack(stage.run(cases.jobs(sampler, steps, arguments.guidance_scale, size_px)))

        reference = run(*REFERENCE)
        samplers = [*NAMED, *((blocks, sampler_steps(blocks, 0)) for blocks in BLOCKS)]
        rows = []
        for sampler, steps in track(samplers, description=arguments.unet):
            latents = run(sampler, steps)
            programs = stage.image(cases.jobs(sampler, steps, arguments.guidance_scale, size_px)[0], handle=0).program
            counts = {name: sum(op.rows for op in programs.ops if op.network == name) for name in networks}
            rows.append({"sampler": sampler, "steps": steps, "rows": counts} | figures(latents, reference))
            print(rows[-1], flush=True)
    costs = {name: network.row_ms for name, network in networks.items()}
    for row in rows:
        row["network_ms"] = round(sum(costs[name] * count for name, count in row["rows"].items()), 3)
    about = {
        "unet": arguments.unet,
        "guidance_scale": arguments.guidance_scale,
        "images": arguments.images,
        "threads": threads,
        "torch": torch.__version__,
        "row_ms": {name: round(cost, 3) for name, cost in costs.items()},
        "reference": figures(reference, reference),
        "rows": rows,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"samplers_{arguments.unet}.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path)


def variant(unet: str, folder: Path) -> Path:
    """The built-in checkpoint with one of its UNets, and that one's refiner, in the place where they are looked for."""
    chosen = {"unet": unet, "unet_refiner": "unet_refiner" if unet == "unet" else f"{unet}_refiner"}
    for part in MODEL_DIR.iterdir():
        if part.name not in chosen:
            (folder / part.name).symlink_to(part)
    for name, source in chosen.items():
        (folder / name).symlink_to(MODEL_DIR / source)
    return folder


def load(folder: Path, slots: int) -> tuple[DenoiserStage, dict[str, Timed]]:
    denoiser = load_denoiser(folder, partial(TorchRunner, device=torch.device("cpu"), dtype=torch.float32))
    networks = {name: Timed(network) for name, network in denoiser.networks.items()}
    assert networks.keys() == {BASE, REFINER}
    return DenoiserStage(type(denoiser)(networks, denoiser.card, denoiser.conditioning_shapes), slots=slots), networks


def make_cases(count: int) -> Cases:
    captions = judge.make_captions(count)
    tokenizer, encoder = load_text()
    values = embed_all(encoder, tokenize(tokenizer, [*captions.prompts, ""])).float().numpy()
    return Cases(values[:-1], values[-1], captions.wanted)


class Judge:
    """Measures latents: their error, and what the classifier sees in the pictures."""

    def __init__(self, cases: Cases) -> None:
        self._vae, self._judge = load_vae().eval(), judge.Judge(cases.wanted)

    def figures(self, latents: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
        """Each figure with the ends of its 95 % interval."""
        difference = np.linalg.norm((latents - reference).reshape(len(latents), -1), axis=1)
        error = torch.from_numpy(difference / np.linalg.norm(reference.reshape(len(latents), -1), axis=1))
        pictures = (decode(self._vae, part) for part in torch.from_numpy(latents).split(64))
        of_latents = {"error": judge.interval(lambda rows: float(error[rows].mean()), len(latents))}
        return of_latents | self._judge.figures(pictures)


if __name__ == "__main__":
    main()
