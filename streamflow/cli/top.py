"""`streamflow top`: a deployment at work, live on the terminal."""

from __future__ import annotations

import io
import itertools
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.connection import Address, ApiKey, Tls, TlsCa, connect
from streamflow.cli.tables import duration

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from streamflow.client import Queue, StageStatus, Status

_PLACES = ("waiting", "encode", "denoise", "decode")
_PRIORITIES = {-1: " low", 0: "", 1: " high"}
_BAR = 12
_BLOCKS, _ASCII = ("\u2588", "\u2591"), ("#", ".")
_RATE_OVER_S = 10.0
# Title, queues, the heads of the tables, and a line for what was left out.
_AROUND = 12


def top(
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    interval: Annotated[float, typer.Option("--interval", "-i", min=0.2, max=60, help="Seconds between looks.")] = 1.0,
    frames: Annotated[int, typer.Option(min=0, help="Leave after so many looks, the last one stays; 0 = never.")] = 0,
) -> None:
    """Watch a deployment at work: its queues, its replicas, and what every slot of the running batch is at.

    Each line of the lower table is an image in a denoiser: how far it is, and the timestep that the network was fed
    last. They differ from slot to slot; that is what the running batch is for. Ctrl-C leaves.

    \b
    Examples:
        streamflow top
        streamflow top --interval 0.5 --address gpu-host:50051
        streamflow top --frames 2 > state.txt
    """
    from rich.console import Console
    from rich.live import Live

    console = Console()
    plain = console.options.ascii_only
    if plain and isinstance(sys.stdout, io.TextIOWrapper):
        # Names may be of any language.
        sys.stdout.reconfigure(errors="replace")
    # Replicas tell of themselves every two seconds, so a rate needs some of them.
    looks: deque[Look] = deque(maxlen=max(2, round(_RATE_OVER_S / interval)))
    with connect(address, api_key, tls, tls_ca) as client:
        looks.append(Look(client.status(), time.monotonic()))
        # A terminal shows frame after frame in one place; anything else gets the last one only.
        with Live(console=console, auto_refresh=False, screen=console.is_terminal and not frames) as live:
            try:
                for number in itertools.count(1):
                    shown = frame(looks[-1], looks[0], lines=console.height, plain=plain)
                    live.update(shown, refresh=console.is_terminal)
                    if number == frames:
                        return
                    time.sleep(interval)
                    looks.append(Look(client.status(), time.monotonic()))
            except KeyboardInterrupt:
                return


@dataclass(frozen=True, slots=True)
class Look:
    """What a deployment said, and when, in seconds of a clock that only rises."""

    status: Status
    at_s: float


def frame(now: Look, before: Look, *, lines: int, plain: bool = False) -> Group:
    """What is shown of a deployment.

    Args:
        before: an earlier look, for rates.
        lines: of the terminal.
        plain: the terminal shows ASCII alone.
    """
    from rich.console import Group

    room, bar = max(3, lines - _AROUND - len(now.status.stages) - len(now.status.missing)), _ASCII if plain else _BLOCKS
    replicas, slots = _replicas(now, before, bar=bar), _slots(now.status, room=room, bar=bar)
    return Group(_title(now, before), _queues(now.status.queues), replicas, slots)


def _title(now: Look, before: Look) -> Text:
    from rich.text import Text

    status = now.status
    made = sum(filter(None, (_rate(stage, now, before) for stage in status.stages if stage.stage == "decoder")))
    text = Text.assemble(
        ("StreamFlow", "bold"),
        f"  {', '.join(status.models)}  up {duration(status.uptime_s)}   ",
        (f"{made:.1f} images/s", "bold green"),
        f"   {sum(queue.images for queue in status.queues)} images to do",
    )
    text.no_wrap = True
    return text


def _queues(queues: Sequence[Queue]) -> Text:
    from rich.text import Text

    images: Counter[tuple[str, int]] = Counter()
    oldest: dict[tuple[str, int], float] = {}
    for queue in queues:
        key = queue.place, queue.priority
        images[key] += queue.images
        oldest[key] = max(oldest.get(key, 0.0), queue.oldest_s)
    parts = []
    for place in _PLACES:
        there = sorted((key for key in images if key[0] == place), key=lambda key: -key[1])
        said = ", ".join(f"{images[key]}{_PRIORITIES.get(key[1], '')} ({oldest[key]:.1f} s)" for key in there)
        parts.append(f"{place} {said or 0}")
    return Text("  >  ".join(parts), style="dim")


def _replicas(now: Look, before: Look, *, bar: tuple[str, str]) -> Table:
    from rich.text import Text

    from streamflow.client.views import STAGES

    made = _table(("stage", "left"), ("replica", "left"), ("runs on", "left"), ("slots in use", "left"), *_NUMBERS)
    for stage in sorted(now.status.stages, key=lambda one: (one.model, STAGES.index(one.stage), one.worker_id)):
        rate = _rate(stage, now, before)
        _add(
            made,
            stage.stage,
            Text(stage.worker_id.rpartition("-")[2], style="yellow" if stage.draining else ""),
            f"{stage.backend} on {stage.device}",
            _bar(stage.slots_in_use, stage.slots, bar),
            "" if rate is None else f"{rate:.1f}",
            f"{stage.image_ms:.0f}" if stage.image_ms else "",
            "draining" if stage.draining else duration(stage.uptime_s),
        )
    for model, missing in now.status.missing:
        _add(made, missing, "none", f"images of {model} wait", "", "", "", "")
    return made


_GIVES_WAY = "runs on"
_NUMBERS = (("images/s", "right"), ("ms/image", "right"), ("up", "right"))


def _slots(status: Status, *, room: int, bar: tuple[str, str]) -> Table:
    made = _table(("image", "left"), ("step", "left"), ("timestep", "right"), ("sampler", "left"), ("denoiser", "left"))
    found = [(slot, stage) for stage in status.stages for slot in stage.work]
    for slot, stage in found[:room]:
        image = f"{slot.request_id[:24]}:{slot.index}" if slot.request_id else "(another tenant's, or direct)"
        replica = stage.worker_id.rpartition("-")[2]
        _add(made, image, _bar(slot.step, slot.steps, bar), f"{slot.timestep:.1f}", slot.sampler, replica)
    if len(found) > room:
        _add(made, f"and {len(found) - room} more", "", "", "", "")
    return made


def _table(*columns: tuple[str, str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
    for name, justify in columns:
        # What a replica runs on gives way first, where the terminal is narrow.
        made.add_column(name, justify="right" if justify == "right" else "left", no_wrap=name != _GIVES_WAY)
    return made


def _add(table: Table, *cells: RenderableType) -> None:
    from rich.text import Text

    # A string would be markup: `perflow[windows=4]` would lose what is in brackets.
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _bar(part: int, whole: int, characters: tuple[str, str]) -> Text:
    """Blocks, and the numbers."""
    from rich.text import Text

    full, (done, rest) = round(_BAR * min(part, whole) / whole) if whole else 0, characters
    return Text.assemble((done * full, "green"), (rest * (_BAR - full), "dim"), f" {part}/{whole}")


def _rate(stage: StageStatus, now: Look, before: Look) -> float | None:
    """Entries a second that a replica ended between two looks; None where there were not two of it."""
    was = {one.worker_id: one.counters.get("ended_total", 0) for one in before.status.stages}
    elapsed_s = now.at_s - before.at_s
    if stage.worker_id not in was or elapsed_s <= 0:
        return None
    return (stage.counters.get("ended_total", 0) - was[stage.worker_id]) / elapsed_s
