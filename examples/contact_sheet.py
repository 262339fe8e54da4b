"""Pictures with captions on one sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_TILE_PX = 192
_MARGIN_PX = 12
_LINE_PX = 14
_LINES = 5
_COLUMN_CHARS = 34


def contact_sheet(pictures: Sequence[tuple[Image.Image, str, str]], *, columns: int = 5) -> Image.Image:
    """Each picture with its prompt and, in grey, what else made it."""
    cell_x, cell_y = _TILE_PX + _MARGIN_PX, _TILE_PX + _LINES * _LINE_PX + 2 * _MARGIN_PX
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_x + _MARGIN_PX, rows * cell_y + _MARGIN_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (picture, prompt, settings) in enumerate(pictures):
        x, y = _MARGIN_PX + number % columns * cell_x, _MARGIN_PX + number // columns * cell_y
        sheet.paste(picture.resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x, y, x + _TILE_PX - 1, y + _TILE_PX - 1), outline="#bbbbbb")
        captions = [(line, "black") for line in textwrap.wrap(prompt, _COLUMN_CHARS)]
        captions += [(line, "#777777") for line in textwrap.wrap(settings, _COLUMN_CHARS)]
        for row, (line, color) in enumerate(captions[:_LINES]):
            draw.text((x, y + _TILE_PX + 5 + row * _LINE_PX), line, fill=color, font=font)
    return sheet
