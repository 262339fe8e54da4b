"""A scene as eight class indices: what the text encoder is taught to read and the classifier to see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.drawing import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, SIZES, Item, Scene

PLACES = (*POSITIONS, *RELATIONS)
_ITEM = (("color", tuple(COLORS)), ("shape", SHAPES), ("size", tuple(SIZES)))
# Class 0 of every attribute is "unsaid", or "no such item".
ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    **{f"{name}_1": (None, *values) for name, values in _ITEM},
    **{f"{name}_2": (None, *values) for name, values in _ITEM},
    "place": (None, *PLACES),
    "background": (None, *BACKGROUNDS),
}
CLASS_COUNTS = [len(values) for values in ATTRIBUTES.values()]


def labels(scene: Scene) -> list[int]:
    """The class index of each of ATTRIBUTES, in their order."""
    nothing = Item(None, None, None)
    first, second = [*scene.items, nothing, nothing][:2]
    values = (
        *(first.color, first.shape, first.size),
        *(second.color, second.shape, second.size),
        *(scene.place, scene.background),
    )
    return [classes.index(value) for classes, value in zip(ATTRIBUTES.values(), values, strict=True)]


def attribute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the attributes: logits [N, sum(CLASS_COUNTS)], targets [N, 8]."""
    parts = logits.split(CLASS_COUNTS, dim=-1)
    losses = [F.cross_entropy(part, targets[:, index]) for index, part in enumerate(parts)]
    return torch.stack(losses).mean()


def predictions(logits: Tensor) -> Tensor:
    """The likeliest class of each attribute: [..., sum(CLASS_COUNTS)] to [..., 8]."""
    return torch.stack([part.argmax(-1) for part in logits.split(CLASS_COUNTS, dim=-1)], dim=-1)


def agrees(seen: Tensor, wanted: Tensor) -> Tensor:
    """Which rows [N] show all that is told: seen and wanted [N, 8].

    What is unsaid may be anything, except that a caption of one item means one; "A and B" may stand in either order.
    """
    color, shape, place = (list(ATTRIBUTES).index(name) for name in ("color_2", "shape_2", "place"))
    exchanged = torch.cat([seen[:, color:place], seen[:, :color], seen[:, place:]], dim=1)
    either_order = (wanted[:, shape] > 0) & (wanted[:, place] == 0)
    alone = (wanted[:, :color] > 0).any(1) & (wanted[:, shape] == 0)
    matches = _shows(seen, wanted) | (either_order & _shows(exchanged, wanted))
    return matches & ~(alone & (seen[:, shape] > 0))


def _shows(seen: Tensor, wanted: Tensor) -> Tensor:
    return ((seen == wanted) | (wanted == 0)).all(1)
