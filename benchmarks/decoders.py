"""How decoders scale: `python -m benchmarks.decoders`.

Latents wait in the decode stream, more than can be decoded while replicas start; then 1, 2 or 4 decoder processes with
one thread each decode them with the full autoencoder. What is timed is the stretch in which all are at work. Beside the
throughput stands how many of the machine's cores were busy, with whatever ran on it.

    python -m benchmarks.decoders --vae-channels 64 128 256 256 --images 96

takes an autoencoder of these widths with random weights, half as wide as Stable Diffusion's, in place of the built-in
model's tiny one: then decoding is all that counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
from diffusers import AutoencoderKL
from rich.progress import Progress

from streamflow.cli.supervisor import LocalDeployment
from streamflow.cli.tables import print_out, table
from streamflow.client import AsyncClient
from streamflow.types import JobState

COUNTS = (1, 2, 4)
PER_REQUEST = 8


@dataclass(frozen=True)
class Lap:
    """Attributes: cores: busy ones, on average over the stretch that was timed."""

    images_per_s: float
    cores: float


async def race(counts: Sequence[int], *, images: int, laps: int, model: Path) -> dict[int, list[Lap]]:
    """By number of decoders; the counts take turns."""
    found: dict[int, list[Lap]] = {count: [] for count in counts}
    settings = {"device": "cpu", "result_keep_s": 3600}
    deployment = LocalDeployment(model=model, decoders=0, slots=images, threads=1, settings=settings)
    with Progress() as progress:
        task = progress.add_task("laps", total=laps * len(counts))
        async with deployment, AsyncClient(deployment.address) as client:
            for lap in range(laps):
                for count in counts:
                    found[count].append(await timed(deployment, client, count, images=images, seed=1000 * lap))
                    progress.advance(task)
    return found


async def timed(deployment: LocalDeployment, client: AsyncClient, count: int, *, images: int, seed: int) -> Lap:
    """What so many decoders do."""
    jobs = [
        await client.submit("a red circle", num_images=PER_REQUEST, steps=1, decoder="full", seed=seed + number)
        for number in range(images // PER_REQUEST)
    ]
    await until(lambda: denoised(client, len(jobs) * PER_REQUEST))
    names = await asyncio.gather(*(deployment.add("decoder") for _ in range(count)))
    before, began_s, idle_s = await left(client), time.perf_counter(), psutil.cpu_times().idle
    # The last images keep fewer and fewer of them busy.
    await until(lambda: at_most(client, count * PER_REQUEST))
    after, took_s, idle_s = await left(client), time.perf_counter() - began_s, psutil.cpu_times().idle - idle_s
    if before < images / 3:
        raise RuntimeError(f"only {before} of {images} images were left when all decoders were there; take more")
    for job in jobs:
        await until(partial(terminal, client, job.request_id))
        ended = await client.job(job.request_id)
        assert (ended.state, ended.num_finished) == (JobState.IMAGES, PER_REQUEST)
    await asyncio.gather(*map(deployment.remove, names))
    return Lap((before - after) / took_s, psutil.cpu_count() - idle_s / took_s)


def with_vae(model: Path, channels: Sequence[int], folder: Path) -> Path:
    """The model with an autoencoder of these widths and random weights; it makes noise, at the cost of a real one."""
    for part in model.iterdir():
        if part.name != "vae":
            (folder / part.name).symlink_to(part.absolute())
    config = AutoencoderKL.load_config(model / "vae")
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config({**config, "block_out_channels": channels, "layers_per_block": 2})
    vae.save_pretrained(folder / "vae")
    return folder


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    # It happens in another process.
    while not await condition():  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def denoised(client: AsyncClient, images: int) -> bool:
    """Whether so many images wait for a decoder, and none is anywhere else."""
    queues = (await client.status()).queues
    return [(queue.place, queue.images) for queue in queues] == [("decode", images)]


async def at_most(client: AsyncClient, images: int) -> bool:
    return await left(client) <= images


async def terminal(client: AsyncClient, request_id: str) -> bool:
    return (await client.job(request_id)).state.terminal


async def left(client: AsyncClient) -> int:
    return sum(queue.images for queue in (await client.status()).queues)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--vae-channels", type=int, nargs=4, metavar="C", help="random autoencoder of these widths")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = with_vae(given.model, given.vae_channels, Path(folder)) if given.vae_channels else given.model
        found = asyncio.run(race(given.counts, images=given.images, laps=given.laps, model=model))
    rates = {count: median(lap.images_per_s for lap in laps) for count, laps in found.items()}
    rows = [
        (
            count,
            f"{rates[count]:.2f}",
            f"{rates[count] / rates[given.counts[0]]:.2f}x",
            f"{median(lap.cores for lap in laps):.2f} of {os.cpu_count()}",
        )
        for count, laps in found.items()
    ]
    print_out(table("decoders", "images/s", f"over {given.counts[0]}", "cores busy", rows=rows))
    if given.json is not None:
        about = {"cores": os.cpu_count(), "images": given.images, "vae_channels": given.vae_channels, "threads": 1}
        laps = {count: [asdict(lap) for lap in laps] for count, laps in found.items()}
        given.json.write_text(json.dumps({**about, "laps": laps}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
