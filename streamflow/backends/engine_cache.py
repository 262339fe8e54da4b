"""TensorRT engines on disk: each built from one graph, for one kind of card, for some rows and sizes.

    engines/REVISION/tensorrt/unet-0f1e2d3c4b5a.engine
                              unet-0f1e2d3c4b5a.json     see store.py
                              timing.cache               what the builder has timed before

An engine is a program that runs on the machine: only what was built here, or came from somebody who is trusted with
that, belongs into this folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from streamflow.backends.graphs import GraphStore
from streamflow.backends.parts import ROWS, Part
from streamflow.backends.store import Store
from streamflow.errors import NotFoundError

HEIGHT, WIDTH = "height", "width"
_FORMAT = 1

Shapes = Mapping[str, tuple[int, ...]]
"""Of a part's inputs, by name."""


@dataclass(frozen=True, slots=True)
class Profiles:
    """What an engine takes: each number of rows in each size, and nothing between them.

    Exact shapes, because for them TensorRT finds the fastest kernels and a call can be kept as a CUDA graph; other
    numbers of rows are padded to the next.

    Attributes:
        rows: rising.
        sizes: (height, width) of the pictures in pixels, rising; for parts without them they do not matter.
    """

    rows: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    def shapes(self, part: Part) -> list[Shapes]:
        """Of the part's inputs, for every profile of its engine in their order."""
        return [
            {name: tuple(_size(axis, axes) for axis in one.shape) for name, one in part.inputs.items()}
            for axes in self._axes(part)
        ]

    def covers(self, wanted: Profiles, part: Part) -> bool:
        """Whether calls of up to as many rows can be made, in all of the sizes."""
        return self.rows[-1] >= wanted.rows[-1] and (not part.sizes or set(wanted.sizes) <= set(self.sizes))

    def command(self, part: Part, dtype: torch.dtype) -> str:
        """What builds an engine of the part with them."""
        precision = str(dtype).removeprefix("torch.")
        sizes = [f"--size {width}x{height}" for height, width in self.sizes if part.sizes]
        return " ".join([f"streamflow engine build --dtype {precision} --rows {self.rows[-1]}", *sizes])

    def _axes(self, part: Part) -> Iterator[Mapping[str, int]]:
        for height, width in self.sizes if part.sizes else ((0, 0),):
            for rows in self.rows:
                yield {ROWS: rows, HEIGHT: height // part.unit_px, WIDTH: width // part.unit_px}


@dataclass(frozen=True, slots=True)
class Platform:
    """What engines are built for.

    Attributes:
        tensorrt: the library's version.
        compute_capability: of the card, such as "9.0".
    """

    tensorrt: str
    compute_capability: str


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that can be used."""

    path: Path
    profiles: Profiles


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine is built; each may cost speed.

    Attributes:
        refittable: weights can be exchanged later.
        version_compatible: later versions of TensorRT, and its lean runtime, can run it too.
    """

    refittable: bool = False
    version_compatible: bool = False


Build = Callable[[Path, Path, list[Shapes], Path, Options], None]
"""From a graph's path to an engine's, with the shapes of its profiles; the last path is that of the timing cache."""


_PLAIN = Options()
_OPTIONS = [field.name for field in fields(Options)]


class EngineCache:
    """The engines of any number of checkpoints, for one platform and one precision.

    Args:
        graphs: what engines are built from.
        dtype: in which networks compute.
        adapters: digests of the adapters that are merged into the weights, in their order.
    """

    def __init__(
        self, graphs: GraphStore, platform: Platform, *, dtype: torch.dtype, adapters: tuple[str, ...] = ()
    ) -> None:
        self._graphs, self._platform, self._dtype, self._adapters = graphs, platform, dtype, adapters

    def __repr__(self) -> str:
        return f"EngineCache({self._graphs.folder}, {self._platform}, {self._dtype})"

    def make(self, part: Part, profiles: Profiles, build: Build, options: Options = _PLAIN) -> Built:
        """Builds the engine, and before that its graph, unless they are there; of several processes one builds."""
        graph = self._graphs.make(part, part.precision(self._dtype))
        made_of = self._made_of(part) | _said(profiles) | asdict(options)
        name = f"{part.name}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}"
        store = _engines(self._graphs, part)
        shapes, timed = profiles.shapes(part), store.folder / "timing.cache"
        store.make(name, made_of, lambda folder: build(graph, folder / f"{name}.engine", shapes, timed, options))
        return Built(store.folder / f"{name}.engine", profiles)

    def find(self, part: Part, wanted: Profiles) -> Built:
        """An engine that was built for this, and takes what is wanted.

        Of several the one with the fewest profiles, and of these the one whose options cost least.

        Raises:
            NotFoundError: there is none; the message says what there is, and the command that builds the right one.
        """
        store, made_of = _engines(self._graphs, part), self._made_of(part)
        reasons, fitting = [], []
        for name, said in store.contents().items():
            if said.get("part") != part.name:
                continue
            try:
                profiles = _read(said)
                store.check(name, made_of | self._kept_version(said))
            except (NotFoundError, LookupError, TypeError, ValueError) as error:
                reasons.append(str(error))
                continue
            if profiles.covers(wanted, part):
                rank = len(profiles.rows) * len(profiles.sizes), sum(said.get(option) is True for option in _OPTIONS)
                fitting.append((rank, Built(store.folder / f"{name}.engine", profiles)))
            else:
                reasons.append(f"{name} takes up to {profiles.rows[-1]} rows, and pictures of {_sizes(profiles)}")
        if not fitting:
            why = "; ".join(reasons) or f"none is in {store.folder}"
            raise NotFoundError(
                f"{part.name}: no engine that fits ({why}); `{wanted.command(part, self._dtype)}` makes it"
            )
        return min(fitting, key=itemgetter(0))[1]

    def _made_of(self, part: Part) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "part": part.name,
            "revision": part.revision,
            "adapters": list(self._adapters),
            "graph": self._graphs.digest(part, part.precision(self._dtype)),
            "precision": str(part.precision(self._dtype)).removeprefix("torch."),
            "tensorrt": self._platform.tensorrt,
            "compute_capability": self._platform.compute_capability,
        }

    def _kept_version(self, said: Mapping[str, Any]) -> dict[str, str]:
        """The version that an engine was built with, where it runs on ours as well.

        Later ones of the same major version; NVIDIA lists a few pairs of major versions besides, which are not used.
        """
        built, ours = (_version(text) for text in (said["tensorrt"], self._platform.tensorrt))
        fits = said.get("version_compatible") is True and built[:1] == ours[:1] and built <= ours
        return {"tensorrt": said["tensorrt"]} if fits else {}


def engines_of(graphs: GraphStore, part: Part) -> list[tuple[str, str, str, str, str]]:
    """What there is of a part, for any platform: its name, the engine's, what it was built for, rows and sizes."""
    found = []
    for name, said in _engines(graphs, part).contents().items():
        if said.get("part") == part.name:
            with suppress(LookupError, TypeError, ValueError):
                profiles = _read(said)
                built_for = f"{said['precision']}, TensorRT {said['tensorrt']}, cards of {said['compute_capability']}"
                found.append((part.name, name, built_for, ", ".join(map(str, profiles.rows)), _sizes(profiles)))
    return found


def powers_of_two(largest: int) -> tuple[int, ...]:
    """Up to `largest`, which is the last: row counts where nothing was measured."""
    return (*(2**k for k in range(largest.bit_length()) if 2**k < largest), largest)


def _size(axis: int | str, axes: Mapping[str, int]) -> int:
    return axes[axis] if isinstance(axis, str) else axis


def _engines(graphs: GraphStore, part: Part) -> Store:
    return Store(graphs.folder / part.revision / "tensorrt", kind="engine", remedy="`streamflow engine build` makes it")


def _version(text: str) -> tuple[int, ...]:
    """Of a library: 10.16.1.11 is later than 10.9."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _said(profiles: Profiles) -> dict[str, Any]:
    return {"rows": list(profiles.rows), "sizes": [list(size) for size in profiles.sizes]}


def _read(said: Mapping[str, Any]) -> Profiles:
    profiles = Profiles(tuple(said["rows"]), tuple((height, width) for height, width in said["sizes"]))
    if not profiles.rows:
        raise ValueError("it has no rows")
    return profiles


def _sizes(profiles: Profiles) -> str:
    return ", ".join(f"{width} x {height}" for height, width in profiles.sizes)
