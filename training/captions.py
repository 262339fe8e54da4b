"""Captions: which attributes of a scene are told, in which words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from training.drawing import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, SIZES, Item, Scene

INVERSE = {"left of": "right of", "above": "below"}
POSITION_PHRASES = {name: f"at the {name}" for name in POSITIONS} | {"center": "in the center"}
FUNCTION_WORDS = (
    "a",
    "an",
    "the",
    "at",
    "in",
    "on",
    "of",
    "to",
    "and",
    "shape",
    "background",
    "no",
    "with",
    "right",
    "below",
)

DROPPED = 0.1  # share of captions that are empty, for classifier-free guidance
FRAGMENTS = 0.08  # share that tell a single thing ("a red shape", "a navy background"), as negative prompts do


def words() -> list[str]:
    """Every word that a caption can hold."""
    relations = [word for relation in RELATIONS for word in relation.split()]
    return sorted({*FUNCTION_WORDS, *SHAPES, *COLORS, *BACKGROUNDS, *SIZES, *POSITIONS, *relations})


def told(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with some attributes left unsaid (None). Shapes and colors are nearly always said."""
    if len(scene.items) == 1 and rng.random() < FRAGMENTS / 0.4:
        return _fragment(scene, rng)
    items = [replace(item, size=item.size if rng.random() < 0.6 else None) for item in scene.items]
    background = scene.background if rng.random() < 0.75 else None
    if len(items) == 1:
        return Scene(tuple(items), scene.place if rng.random() < 0.65 else None, background)
    if rng.random() < 0.15:  # "and": the order of mention then says nothing about the picture
        order = rng.permutation(2)
        return Scene((items[order[0]], items[order[1]]), None, background)
    return Scene(tuple(items), scene.place, background)


def _fragment(scene: Scene, rng: np.random.Generator) -> Scene:
    item = scene.items[0]
    choices = (
        Scene((Item(item.shape, None, None),), None, None),
        Scene((Item(None, item.color, None),), None, None),
        Scene((), None, scene.background),
    )
    return choices[rng.integers(3)]


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """The caption of what is told, in one of a few wordings: "a small cyan star above a ring on a gray background"."""
    first, *rest = [_name(item) for item in scene.items] or [""]
    if rest:
        first = _pair(first, rest[0], scene.place, rng)
    elif scene.place is not None:
        first = f"{first} {POSITION_PHRASES[scene.place]}"
    if scene.background is not None:
        first = (
            f"{first} on {_article(scene.background)} background"
            if first
            else f"{_article(scene.background)} background"
        )
    if rng.random() < 0.1:
        first = " ".join(word for word in first.split() if word not in ("a", "an", "the"))
    return first


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A training caption of a complete scene: partly told, and empty in a tenth of the cases."""
    return "" if rng.random() < DROPPED else describe(told(scene, rng), rng)


def _pair(first: str, second: str, relation: str | None, rng: np.random.Generator) -> str:
    if relation is None:
        return f"{first} and {second}"
    if rng.random() < 0.25:
        first, second, relation = second, first, INVERSE[relation]
    if relation.endswith(" of") and rng.random() < 0.3:
        relation = f"to the {relation}"
    return f"{first} {relation} {second}"


def _name(item: Item) -> str:
    return _article(" ".join(word for word in (item.size, item.color, item.shape or "shape") if word))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
