"""Progress bars and previews of one request, on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from streamflow.client import events

_MAX_BARS = 8
_PREVIEW_COLUMNS = 32


@contextmanager
def show_progress(paths: Sequence[Path]) -> Iterator[Callable[[events.Event], None]]:
    """Gives the function that takes the events; previews are written beside `paths`, which image k will have."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
    )
    with Live(bars, console=console, transient=True) as live, _shown_warnings(console):
        yield _Display(live, bars, paths).take


@contextmanager
def _shown_warnings(console: Console) -> Iterator[None]:
    """What the client has to say beside its events, such as that the gateway is gone, above the bars."""
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("streamflow.client")
    handler.emit = lambda record: console.print(f"streamflow: {record.getMessage()}", highlight=False)  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Display:
    def __init__(self, live: Live, bars: Progress, paths: Sequence[Path]) -> None:
        self._live, self._bars, self._paths = live, bars, paths
        self._tasks: dict[int, TaskID] = {}
        self._all = bars.add_task("images", total=len(paths), note="sent")

    def take(self, event: events.Event) -> None:
        match event:
            case events.Queued():
                wait = "" if event.estimate_s is None else f", done in about {event.estimate_s:.0f} s"
                self._bars.update(self._all, note=f"{event.position} images ahead{wait}")
            case events.Progress():
                self._step(event)
            case events.Preview():
                self._preview(event)
            case events.ImageReady():
                self._bars.advance(self._all)
                self._bars.update(self._all, note="")
                if event.info.index in self._tasks:
                    self._bars.remove_task(self._tasks.pop(event.info.index))

    def _step(self, event: events.Progress) -> None:
        self._bars.update(self._all, note="")
        if event.index not in self._tasks and len(self._tasks) < _MAX_BARS:
            self._tasks[event.index] = self._bars.add_task(f"image {event.index}", total=event.steps, note="")
        if event.index in self._tasks:
            note = f"step {event.step} of {event.steps}"
            self._bars.update(self._tasks[event.index], completed=event.step, note=note)

    def _preview(self, event: events.Preview) -> None:
        path = preview_path(self._paths[event.index], event.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(event.data)
        if self._live.console.is_terminal:
            self._live.update(Group(half_blocks(event.image), self._bars))


def preview_path(path: Path, step: int) -> Path:
    """circle.png -> circle-step05.jpg"""
    return path.with_name(f"{path.stem}-step{step:02}.jpg")


def half_blocks(image: Image.Image, columns: int = _PREVIEW_COLUMNS) -> Text:
    """A picture as text: each character is two pixels, one above the other."""
    rows = max(2, round(columns * image.height / image.width / 2) * 2)
    small = image.convert("RGB").resize((columns, rows), Image.Resampling.BILINEAR)
    data = small.tobytes()
    text = Text(no_wrap=True)
    for y in range(0, rows, 2):
        for x in range(columns):
            upper, lower = (_hex(data, (y + below) * columns + x) for below in (0, 1))
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    return text


def _hex(data: bytes, pixel: int) -> str:
    return "#" + data[3 * pixel : 3 * pixel + 3].hex()
