"""Many requests at once: each takes its own number of steps, and they share the denoiser's batch.

streamflow up                       # in another terminal
python examples/asyncio_many.py
"""

from __future__ import annotations

import argparse
import asyncio
import time

from streamflow import AsyncClient

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")


async def make(client: AsyncClient, color: str, steps: int, folder: str) -> None:
    began_s = time.perf_counter()
    result = await client.generate(f"a large {color} ring on a black background", steps=steps, seed=7)
    (path,) = result.save(f"{folder}/{color}.png")
    print(f"{path}: {steps:2} steps, {time.perf_counter() - began_s:.2f} s after it was sent")


async def run(address: str, folder: str) -> None:
    async with AsyncClient(address) as client, asyncio.TaskGroup() as tasks:
        for number, color in enumerate(COLORS):
            tasks.create_task(make(client, color, steps=(25, 1, 8, 4)[number % 4], folder=folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--output", default="out/many", help="a folder")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.address, arguments.output))


if __name__ == "__main__":
    main()
