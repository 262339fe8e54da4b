"""`streamflow top`: a deployment at work, live on the terminal."""

from __future__ import annotations

import io
import itertools
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.connection import Address, ApiKey, Tls, TlsCa, connect
from streamflow.cli.tables import duration
from streamflow.errors import BusyError, DeadlineError, UnavailableError

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from streamflow.client import Client, Queue, StageStatus, Status

_PLACES = ("waiting", "encode", "denoise", "decode")
_PRIORITIES = {-1: " low", 0: "", 1: " high"}
_BAR = 12
_BLOCKS, _ASCII = ("\u2588", "\u2591"), ("#", ".")
_RATE_OVER_S = 10.0
# A gateway answers in milliseconds; one that is started again is found soon after.
_ANSWER_S = 2.0
# On fewer columns there are numbers without bars; then ids are shorter too, and what a replica runs on is not told.
_BARS_FROM, _NAMES_FROM = 96, 80
# The heads of the tables, and a line for what was left out.
_AROUND = 9
# No longer word is wrapped.
_WORD = 12


def top(
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    interval: Annotated[float, typer.Option("--interval", "-i", min=0.2, max=60, help="Seconds between looks.")] = 1.0,
    frames: Annotated[int, typer.Option(min=0, help="Leave after so many looks; 0 = never.")] = 0,
) -> None:
    """Watch a deployment at work: its queues, its replicas, and what every slot of the running batch is at.

    Each line of the lower table is an image in a denoiser: how far it is, and the timestep that the network was fed
    last. They differ from slot to slot; that is what the running batch is for. Ctrl-C leaves. While no gateway answers,
    the last look stays and says how old it is. Into a file or a pipe it writes one look below the other, and ends when
    there is no answer.

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
        # A terminal shows frame after frame in one place.
        live = Live(console=console, auto_refresh=False, screen=not frames) if console.is_terminal else None
        if live is not None:
            # What the client tells of a gateway that does not answer is part of the frame.
            logging.getLogger("streamflow.client").setLevel(logging.ERROR)
        trouble = ""
        with live or nullcontext():
            try:
                for number in itertools.count(1):
                    width, lines = console.size
                    shown = frame(looks[-1], looks[0], trouble, width=width, lines=lines, plain=plain)
                    if live is None:
                        console.print(shown)
                    else:
                        live.update(shown, refresh=True)
                    if number == frames:
                        return
                    time.sleep(interval)
                    if live is None:
                        looks.append(Look(client.status(), time.monotonic()))
                    else:
                        trouble = _look_again(client, looks)
            except KeyboardInterrupt:
                return


def _look_again(client: Client, looks: deque[Look]) -> str:
    """Why there is no new look; empty where there is one."""
    try:
        looks.append(Look(client.status(timeout_s=_ANSWER_S), time.monotonic()))
    except (UnavailableError, DeadlineError, BusyError) as error:
        reason = "the gateway does not answer" if isinstance(error, DeadlineError) else error
        return f"as it was {time.monotonic() - looks[-1].at_s:.0f} s ago: {reason}"
    return ""


@dataclass(frozen=True, slots=True)
class Look:
    """What a deployment said, and when, in seconds of a clock that only rises."""

    status: Status
    at_s: float


def frame(now: Look, before: Look, trouble: str = "", *, width: int, lines: int, plain: bool = False) -> Group:
    """What is shown of a deployment.

    Args:
        before: an earlier look, for rates.
        trouble: why there is no newer look.
        width, lines: of the terminal.
        plain: the terminal shows ASCII alone.
    """
    from rich.console import Group

    heads = [_title(now, before), *([_trouble(trouble)] if trouble else []), _queues(now.status.queues)]
    around = _AROUND + sum(1 + len(text) // max(1, width - _WORD) for text in heads)
    room = max(3, lines - around - len(now.status.stages) - len(now.status.missing))
    bar = None if width < _BARS_FROM else _ASCII if plain else _BLOCKS
    wide = width >= _NAMES_FROM
    replicas = _replicas(now, before, bar=bar, wide=wide)
    return Group(*heads, replicas, _slots(now.status, room=room, bar=bar, wide=wide))


def _trouble(said: str) -> Text:
    from rich.text import Text

    return Text(said, style="bold red")


def _title(now: Look, before: Look) -> Text:
    from rich.text import Text

    status = now.status
    made = sum(filter(None, (_rate(stage, now, before) for stage in status.stages if stage.stage == "decoder")))
    return Text.assemble(
        ("StreamFlow", "bold"),
        f"  {', '.join(status.models)}  up {duration(status.uptime_s)}   ",
        (f"{made:.1f} images/s", "bold green"),
        f"   {sum(queue.images for queue in status.queues)} images to do",
    )


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
        said = ", ".join(f"{images[key]}{_PRIORITIES.get(key[1], '')} (oldest {oldest[key]:.1f} s)" for key in there)
        parts.append(f"{place} {said or 0}")
    return Text("  >  ".join(parts), style="dim")


def _replicas(now: Look, before: Look, *, bar: tuple[str, str] | None, wide: bool) -> Table:
    from rich.text import Text

    from streamflow.client.views import STAGES

    runs_on = [(_RUNS_ON, "left")] if wide else []
    slots = "slots in use" if wide else "slots"
    made = _table(("stage", "left"), ("replica", "left"), *runs_on, (slots, "left"), *_NUMBERS, wide=wide)
    for stage in sorted(now.status.stages, key=lambda one: (one.model, STAGES.index(one.stage), one.worker_id)):
        rate = _rate(stage, now, before)
        _add(
            made,
            stage.stage,
            Text(stage.worker_id.rpartition("-")[2], style="yellow" if stage.draining else ""),
            *([_cut(f"{stage.backend} on {stage.device}")] if wide else []),
            _bar(stage.slots_in_use, stage.slots, bar),
            "" if rate is None else f"{rate:.1f}",
            f"{stage.image_ms:.0f}" if stage.image_ms else "",
            "draining" if stage.draining else duration(stage.uptime_s),
        )
    for model, missing in now.status.missing:
        _add(made, missing, "none", *([_cut(f"{model} waits")] if wide else []), "", "", "", "")
    return made


def _cut(cell: str) -> Text:
    """Of a column that gives way."""
    from rich.text import Text

    return Text(cell, no_wrap=True, overflow="ellipsis")


_RUNS_ON, _SAMPLER = "runs on", "sampler"
_NUMBERS = (("images/s", "right"), ("ms/image", "right"), ("up", "right"))


def _slots(status: Status, *, room: int, bar: tuple[str, str] | None, wide: bool) -> Table:
    columns = (("image", "left"), ("step", "left"), ("timestep", "right"), (_SAMPLER, "left"), ("denoiser", "left"))
    made = _table(*columns, wide=wide)
    characters, nobody = (24, "(another tenant's, or direct)") if wide else (8, "(another's)")
    found = [(slot, stage) for stage in status.stages for slot in stage.work]
    for slot, stage in found[:room]:
        image = f"{slot.request_id[:characters]}:{slot.index}" if slot.request_id else nobody
        replica = stage.worker_id.rpartition("-")[2]
        _add(made, image, _bar(slot.step, slot.steps, bar), f"{slot.timestep:.1f}", _cut(slot.sampler), replica)
    if len(found) > room:
        _add(made, f"and {len(found) - room} more", "", "", "", "")
    return made


def _table(*columns: tuple[str, str], wide: bool) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1) if wide else (0, 1, 0, 0))
    for name, justify in columns:
        # What may be wrapped gives way first, where the terminal is narrow.
        no_wrap = name not in (_RUNS_ON, _SAMPLER)
        made.add_column(name, justify="right" if justify == "right" else "left", no_wrap=no_wrap)
    return made


def _add(table: Table, *cells: RenderableType) -> None:
    from rich.text import Text

    # A string would be markup: `perflow[windows=4]` would lose what is in brackets.
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _bar(part: int, whole: int, characters: tuple[str, str] | None) -> Text:
    """Blocks, if there is room for them, and the numbers."""
    from rich.text import Text

    if characters is None:
        return Text(f"{part}/{whole}")
    full, (done, rest) = round(_BAR * min(part, whole) / whole) if whole else 0, characters
    return Text.assemble((done * full, "green"), (rest * (_BAR - full), "dim"), f" {part}/{whole}")


def _rate(stage: StageStatus, now: Look, before: Look) -> float | None:
    """Entries a second that a replica ended between two looks; None where there were not two of it."""
    was = {one.worker_id: one.counters.get("ended_total", 0) for one in before.status.stages}
    elapsed_s = now.at_s - before.at_s
    if stage.worker_id not in was or elapsed_s <= 0:
        return None
    return (stage.counters.get("ended_total", 0) - was[stage.worker_id]) / elapsed_s
