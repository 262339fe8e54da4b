"""Scenes of one or two shapes, and their rasters.

A scene is a choice of words; a `Layout` adds the jitter (where exactly, how large, which hue) and is what is drawn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGE_PX = 128
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.97, 0.88, 0.12),
    "green": (0.12, 0.62, 0.20),
    "cyan": (0.12, 0.82, 0.88),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.50, 0.14, 0.68),
    "pink": (0.98, 0.52, 0.76),
}
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.50, 0.50, 0.50),
    "black": (0.05, 0.05, 0.05),
    "navy": (0.05, 0.07, 0.28),
}
SIZES = {"small": 14.0, "large": 25.0}  # radius, px
POSITIONS = {
    "left": (34.0, 64.0),
    "right": (94.0, 64.0),
    "top": (64.0, 34.0),
    "bottom": (64.0, 94.0),
    "center": (64.0, 64.0),
}
RELATIONS = {"left of": ((34.0, 64.0), (94.0, 64.0)), "above": ((64.0, 34.0), (64.0, 94.0))}

MIN_CONTRAST = 0.42  # distance in RGB below which a color is not drawn on a background
POSITION_JITTER_PX = 5.0
SIZE_JITTER = 0.08
COLOR_JITTER = 0.025


@dataclass(frozen=True)
class Item:
    """One shape of a scene."""

    shape: str | None
    color: str | None
    size: str | None


@dataclass(frozen=True)
class Scene:
    """One or two items, where they are, and on what. None means left unsaid, and occurs only in what a caption tells.

    `place` is a key of POSITIONS for one item and of RELATIONS for two: `items[0]` is then the left or upper one.
    """

    items: tuple[Item, ...]
    place: str | None
    background: str | None


@dataclass(frozen=True)
class Layout:
    """A batch of scenes with every number settled. An absent second item has radius 0.

    background [B, 3] and color [B, 2, 3] in 0..1, shape [B, 2] (index in SHAPES), center [B, 2, 2] (x, y) and
    radius [B, 2] in px.
    """

    background: Tensor
    color: Tensor
    shape: Tensor
    center: Tensor
    radius: Tensor


def contrasts(color: str, background: str) -> bool:
    """Whether a shape of this color can be told from this background."""
    distance = np.linalg.norm(np.subtract(COLORS[color], BACKGROUNDS[background]))
    return bool(distance >= MIN_CONTRAST)


def random_scene(rng: np.random.Generator) -> Scene:
    """A complete scene of one item (40 %) or two."""
    background = str(rng.choice(list(BACKGROUNDS)))
    colors = [color for color in COLORS if contrasts(color, background)]
    count = 1 if rng.random() < 0.4 else 2
    items = tuple(
        Item(str(rng.choice(SHAPES)), str(rng.choice(colors)), str(rng.choice(list(SIZES)))) for _ in range(count)
    )
    place = str(rng.choice(list(POSITIONS if count == 1 else RELATIONS)))
    return Scene(items, place, background)


def is_held_out(scene: Scene) -> bool:
    """Whether a complete scene belongs to the tenth of all scenes that is never trained on."""
    return hashlib.sha256(repr(scene).encode()).digest()[0] < 26


def sample_scenes(count: int, rng: np.random.Generator, *, held_out: bool = False) -> list[Scene]:
    """`count` random scenes of one side of the split."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if is_held_out(scene) == held_out:
            scenes.append(scene)
    return scenes


def lay_out(scenes: list[Scene], rng: np.random.Generator) -> Layout:
    """Settles position, size and hue of complete scenes, with jitter."""
    count = len(scenes)
    shape, center = np.zeros((count, 2), np.int64), np.zeros((count, 2, 2), np.float32)
    radius, color = np.zeros((count, 2), np.float32), np.zeros((count, 2, 3), np.float32)
    background = np.array([BACKGROUNDS[str(scene.background)] for scene in scenes], np.float32)
    for row, scene in enumerate(scenes):
        centers = (POSITIONS[str(scene.place)],) if len(scene.items) == 1 else RELATIONS[str(scene.place)]
        for column, (item, where) in enumerate(zip(scene.items, centers, strict=True)):
            shape[row, column] = SHAPES.index(str(item.shape))
            color[row, column] = COLORS[str(item.color)]
            center[row, column] = where
            radius[row, column] = SIZES[str(item.size)]
    center += rng.uniform(-POSITION_JITTER_PX, POSITION_JITTER_PX, center.shape)
    radius *= rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER, radius.shape)
    color += rng.uniform(-COLOR_JITTER, COLOR_JITTER, color.shape)
    background += rng.uniform(-COLOR_JITTER, COLOR_JITTER, background.shape)
    arrays = (background.clip(0, 1), color.clip(0, 1), shape, center, radius.astype(np.float32))
    return Layout(*map(torch.from_numpy, arrays))


def draw(layout: Layout, *, size_px: int = IMAGE_PX, origin: Tensor | None = None) -> Tensor:
    """Images [B, 3, size_px, size_px] in -1..1, anti-aliased.

    `origin` [B, 2] (x, y) in px cuts a window out of the drawing.
    """
    axis = torch.arange(size_px, dtype=torch.float32) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"))  # [2, H, W]
    offset = torch.zeros(len(layout.shape), 2) if origin is None else origin.float()
    image = layout.background[:, :, None, None].expand(-1, -1, size_px, size_px).clone()
    for column in range(2):
        points = grid + (offset - layout.center[:, column])[:, :, None, None]
        for index, distance in enumerate(_DISTANCES):
            rows = ((layout.shape[:, column] == index) & (layout.radius[:, column] > 0)).nonzero()[:, 0]
            if len(rows):
                radius = layout.radius[rows, column, None, None]
                edge = distance(points[rows, 0], points[rows, 1], radius)
                cover = (0.5 - edge).clamp(0, 1)[:, None]
                paint = layout.color[rows, column, :, None, None]
                image[rows] += cover * (paint - image[rows])
    return image * 2 - 1


# Signed distances in px to each shape's outline (negative inside), y pointing down. For the polygons they are exact
# near the outline except at the outer corners, which is all that anti-aliasing needs.


def _box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95 * radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return _box(x, y, 0.85 * radius, 0.85 * radius)


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    inner = 0.55 * radius
    y = y - 0.2 * radius
    return torch.maximum(y, 0.8660254 * x.abs() - 0.5 * y) - inner


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    sector = 2 * np.pi / 5
    angle = torch.atan2(x, -y)  # 0 is up, where one tip points
    folded = (angle - sector * torch.round(angle / sector)).abs()
    length = torch.hypot(x, y)
    along, across = length * torch.cos(folded), length * torch.sin(folded)
    tip, notch = 1.1 * radius, 0.46 * radius
    notch_x, notch_y = notch * np.cos(sector / 2), notch * np.sin(sector / 2)
    # The edge runs from the tip (tip, 0) to the notch; its outward normal is (notch_y, tip - notch_x).
    normal = torch.hypot(notch_y, tip - notch_x)
    return ((along - tip) * notch_y + across * (tip - notch_x)) / normal


def _ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.76 * radius).abs() - 0.24 * radius


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    long, short = 0.95 * radius, 0.3 * radius
    return torch.minimum(_box(x, y, long, short), _box(x, y, short, long))


_DISTANCES = (_circle, _square, _triangle, _star, _ring, _cross)
