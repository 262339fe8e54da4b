"""The outcome of `generate`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

from PIL import Image

from streamflow.client.events import Accepted, Done, Event, ImageInfo, ImageReady, RequestWarning, decode_image
from streamflow.types import ImageFormat

# A name, and for the numbers how wide they are: {index:03}.
_FIELD = re.compile(r"\{(?:(?:index|seed)(?::0?\d{1,2}d?)?|request_id|suffix)\}")
_SUFFIXES: Mapping[ImageFormat, str] = {ImageFormat.JPEG: "jpg", ImageFormat.RAW: "rgb"}


@dataclass(frozen=True)
class Result:
    """All images of a request, in order.

    Attributes:
        seed: of image 0; image k has seed + k.
        infos: what is known of each image.
        files: each image's file, in `infos[k].format`.
        warnings: what the server said beside, such as a prompt that was cut.
        total_ms: from admission to the last image, by the server's clock.
    """

    request_id: str
    seed: int
    infos: tuple[ImageInfo, ...]
    files: tuple[bytes, ...] = field(repr=False)
    warnings: tuple[RequestWarning, ...] = ()
    total_ms: float = 0.0

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures, RGB."""
        return [decode_image(info, data) for info, data in zip(self.infos, self.files, strict=True)]

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds: the median over the images of each part of the way, and `total_ms`."""
        parts = ("waiting_ms", "encode_ms", "denoise_ms", "decode_ms")
        medians = {part: median(getattr(info.timings, part) for info in self.infos) for part in parts}
        return {**medians, "total_ms": self.total_ms}

    def save(self, target: str | Path) -> list[Path]:
        """Writes every image and returns where; see `output_paths`. Existing files are replaced."""
        seeds = [info.seed for info in self.infos]
        suffix = suffix_of(self.infos[0].format)
        paths = output_paths(target, request_id=self.request_id, seeds=seeds, suffix=suffix)
        write_files(self.files, paths)
        return paths


class ResultBuilder:
    """Gathers the events of one request."""

    def __init__(self) -> None:
        self._accepted: Accepted | None = None
        self._images: list[ImageReady] = []
        self._warnings: list[RequestWarning] = []
        self._total_ms = 0.0

    def add(self, event: Event) -> None:
        match event:
            case Accepted():
                self._accepted = event
            case ImageReady():
                self._images.append(event)
            case RequestWarning():
                self._warnings.append(event)
            case Done():
                self._total_ms = event.total_ms

    def result(self, request_id: str) -> Result:
        images = sorted(self._images, key=lambda ready: ready.info.index)
        return Result(
            request_id=request_id,
            seed=self._accepted.seed if self._accepted else images[0].info.seed,
            infos=tuple(ready.info for ready in images),
            files=tuple(ready.data for ready in images),
            warnings=tuple(self._warnings),
            total_ms=self._total_ms,
        )


def suffix_of(kind: ImageFormat) -> str:
    """The end of a file's name, without the dot."""
    return _SUFFIXES.get(kind, kind.value)


def write_files(files: Sequence[bytes], paths: Sequence[Path]) -> None:
    """Makes the folders that are missing, and replaces what is there. Raises OSError."""
    for path, data in zip(paths, files, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def output_paths(target: str | Path, *, request_id: str, seeds: Sequence[int], suffix: str) -> list[Path]:
    """Where the images of a request go.

    Args:
        target: a pattern with {index}, {seed}, {request_id} or {suffix}, the numbers as {index:03} too; or a file's
            name, which gets -0, -1 ... before its ending when there are several images; or else a folder (one that is
            there, or a name without ending).

    Raises:
        ValueError: the pattern asks for something else, or gives several images one name.
    """
    text = str(target)
    path = Path(target)
    if "{" not in text:
        if path.is_dir() or not path.suffix or text.endswith("/"):
            text = str(path / "{request_id}-{index}.{suffix}")
        elif len(seeds) > 1:
            text = str(path.with_name(f"{path.stem}-{{index}}{path.suffix}"))
    values = [{"index": k, "seed": seed, "request_id": request_id, "suffix": suffix} for k, seed in enumerate(seeds)]
    if re.search(r"[{}]", _FIELD.sub("", text)):
        allowed = "{index}, {seed}, {request_id} and {suffix}, and numbers with a width, such as {index:03}"
        raise ValueError(f"{target}: a pattern may hold {allowed}")
    paths = [Path(text.format(**each)) for each in values]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{target}: gives several images one name; add {{index}}")
    return paths
