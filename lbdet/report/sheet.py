"""What do many pictures have in common? A contact sheet: each small, its boxes drawn, a few lines below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from lbdet.report.draw import draw_detections
from lbdet.report.font import Font, load_font

_TILE, _PICTURE, _GAP, _FONT, _LINES = 400, 300, 12, 14, 5
_COLUMNS = 4
_INK, _PAPER, _EMPTY = (24, 24, 27), (255, 255, 255), (212, 212, 216)


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet."""

    image: np.ndarray | None
    """uint8 `[H, W, 3]`, RGB; None = it cannot be shown"""
    boxes: Sequence[tuple[float, float, float, float]]
    """in its pixels; reversed ones and those outside are drawn as they can be"""
    names: Sequence[str]
    """of the boxes"""
    lines: Sequence[str]
    """what stands below"""


def contact_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """Draw tiles row by row, four a row; a new RGB picture."""
    rows = math.ceil(len(tiles) / _COLUMNS)
    height = _PICTURE + round(1.4 * _FONT * _LINES) + _GAP
    sheet = Image.new("RGB", (_COLUMNS * (_TILE + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _PAPER)
    canvas, font = ImageDraw.Draw(sheet), load_font(_FONT)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, _COLUMNS)
        x, y = _GAP + column * (_TILE + _GAP), _GAP + row * (height + _GAP)
        picture = _picture(tile)
        sheet.paste(picture, (x, y + _PICTURE - picture.height))
        for number, line in enumerate(_wrapped(tile.lines, font)):
            canvas.text((x, y + _PICTURE + 6 + round(1.4 * _FONT * number)), line, fill=_INK, font=font)
    return sheet


def _picture(tile: Tile) -> Image.Image:
    if tile.image is None:
        return Image.new("RGB", (_TILE, _PICTURE), _EMPTY)
    height, width = tile.image.shape[:2]
    boxes = np.array([_inside(box, width, height) for box in tile.boxes], np.float64).reshape(-1, 4)
    found = {"boxes": boxes, "labels": np.arange(1, len(boxes) + 1)}
    picture = draw_detections(tile.image, found, tile.names)
    picture.thumbnail((_TILE, _PICTURE))
    return picture


def _inside(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Return what can be shown of a box: its corners in order, at least a pixel of it in the image."""
    x1, x2 = sorted((box[0], box[2]))
    y1, y2 = sorted((box[1], box[3]))
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, max(min(x2, width), x1 + 1), max(min(y2, height), y1 + 1)


def _wrapped(lines: Sequence[str], font: Font) -> list[str]:
    """Break lines at the width of a tile, as many as there is room for."""
    broken = [""]
    for line in lines:
        for word in line.split():
            if broken[-1] and font.getlength(f"{broken[-1]} {word}") > _TILE:
                broken.append("")
            broken[-1] += f" {word}" if broken[-1] else word
        broken.append("")
    kept = [line for line in broken if line]
    return kept if len(kept) <= _LINES else [*kept[: _LINES - 1], "..."]
