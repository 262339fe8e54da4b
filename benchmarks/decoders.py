"""How decoders scale: `python -m benchmarks.decoders`.

Latents wait in the decode stream, more than can be decoded while replicas start; then 1, 2 or 4 decoder processes with
one thread each decode them with the full autoencoder. What is timed is the stretch in which all are at work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from rich.progress import Progress

from streamflow.cli.supervisor import LocalDeployment
from streamflow.cli.tables import print_out, table
from streamflow.client import AsyncClient
from streamflow.types import JobState

COUNTS = (1, 2, 4)
PER_REQUEST = 16


async def race(counts: Sequence[int], *, images: int, laps: int, model: Path) -> dict[int, list[float]]:
    """Images a second by number of decoders, for every lap; the counts take turns."""
    found: dict[int, list[float]] = {count: [] for count in counts}
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


async def timed(deployment: LocalDeployment, client: AsyncClient, count: int, *, images: int, seed: int) -> float:
    """Images a second of so many decoders."""
    jobs = [
        await client.submit("a red circle", num_images=PER_REQUEST, steps=1, decoder="full", seed=seed + number)
        for number in range(images // PER_REQUEST)
    ]
    await until(lambda: denoised(client, len(jobs) * PER_REQUEST))
    names = await asyncio.gather(*(deployment.add("decoder") for _ in range(count)))
    before, began_s = await left(client), time.perf_counter()
    # The last images keep fewer and fewer of them busy.
    await until(lambda: at_most(client, count * PER_REQUEST))
    rate = (before - await left(client)) / (time.perf_counter() - began_s)
    if before < images / 3:
        raise RuntimeError(f"only {before} of {images} images were left when all decoders were there; take more")
    for job in jobs:
        await until(partial(terminal, client, job.request_id))
        ended = await client.job(job.request_id)
        assert (ended.state, ended.num_finished) == (JobState.IMAGES, PER_REQUEST)
    await asyncio.gather(*map(deployment.remove, names))
    return rate


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
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args()
    found = asyncio.run(race(given.counts, images=given.images, laps=given.laps, model=given.model))
    alone = median(found[given.counts[0]])
    rows = [(count, f"{median(rates):.1f}", f"{median(rates) / alone:.2f}x") for count, rates in found.items()]
    print_out(table("decoders", "images/s", "over one", rows=rows))
    if given.json is not None:
        about = {"cores": os.cpu_count(), "images": given.images, "decoder": "full", "threads": 1}
        given.json.write_text(json.dumps({**about, "images_per_s": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
