"""How do detections look? Boxes with names and scores on a photo, and two models side by side.

A line has a dark rim and a label its own background, so both can be read on any photo. Colours that carry a
meaning are Okabe and Ito's, which colour-blind people can tell apart, and each has a line style of its own.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from lbdet.metrics.diff import DetectionDiff
from lbdet.report.font import Font, load_font

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class LineStyle:
    """How boxes of one kind are drawn."""

    colour: Colour
    dashes: tuple[float, float] | None = None
    """length of a dash and of a gap in line widths; None = solid"""


KEPT = LineStyle((86, 180, 233))
LOST = LineStyle((230, 159, 0), dashes=(5, 3))
NEW = LineStyle((204, 121, 167), dashes=(1.5, 1.5))

_MIN_SIDE = 640  # pixels: smaller images are enlarged, or their labels would hide them
_WHITE, _INK = (255, 255, 255), (24, 24, 27)


@dataclass(frozen=True)
class _Sizes:
    """Lengths in pixels that follow the picture's longer side."""

    line: int
    font: int
    pad: int

    @staticmethod
    def of(picture: Image.Image) -> _Sizes:
        side = max(picture.size)
        font = max(12, round(side / 42))
        return _Sizes(line=max(2, round(side / 280)), font=font, pad=max(3, font // 4))


def class_colour(label: int) -> Colour:
    """Return a label's colour, the same in every picture: light, and far in hue from its neighbours'."""
    hue = (0.57 + label * 0.61803398875) % 1  # steps of the golden ratio never come back to the same hue
    rgb = np.array(colorsys.hsv_to_rgb(hue, (1.0, 0.6, 0.8)[label % 3], 1.0))
    luminance = rgb @ (0.299, 0.587, 0.114)
    rgb += (1 - rgb) * max(0.0, (0.5 - luminance) / (1 - luminance))
    red, green, blue = np.rint(255 * rgb).astype(int).tolist()
    return red, green, blue


def draw_detections(
    image: np.ndarray, detections: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> Image.Image:
    """Draw every detection with its name and score, if it has one; apply the score threshold first.

    Args:
        image: uint8 `[H, W, 3]`, RGB.
        detections: `{"boxes": [N, 4], "labels": [N], "scores": [N]}` in pixels of `image`,
            boxes finite; what lies outside is not drawn. Annotations have no scores.
        class_names: the name of label c at c - 1.

    Returns:
        A new RGB picture, `image`, enlarged if its longer side is under 640 pixels.

    Raises:
        ValueError: an image that is not uint8 `[H, W, 3]`, or a label without a name.
    """
    styles = [LineStyle(class_colour(int(label))) for label in detections["labels"]]
    return _draw(image, detections, class_names, styles)


def draw_pair(
    image: np.ndarray,
    left: Mapping[str, np.ndarray],
    right: Mapping[str, np.ndarray],
    diff: DetectionDiff,
    class_names: Sequence[str],
    titles: tuple[str, str],
) -> Image.Image:
    """Draw two models' detections of one image side by side, coloured by what became of them.

    Args:
        image: uint8 `[H, W, 3]`, RGB.
        left: the reference's detections, as for `draw_detections`; kept ones are solid, lost ones dashed.
        right: the other's detections; kept ones are solid, new ones dotted.
        diff: `diff_detections(left, right)`.
        class_names: the name of label c at c - 1.
        titles: what stands above the left and the right picture.

    Returns:
        A new RGB picture: each side a strip with its title and counts above the image.

    Raises:
        ValueError: as for `draw_detections`.
    """
    kept = ("kept", len(diff.kept), KEPT)
    lost, new = set(diff.lost.tolist()), set(diff.new.tolist())
    left_styles = [LOST if i in lost else KEPT for i in range(len(left["labels"]))]
    right_styles = [NEW if i in new else KEPT for i in range(len(right["labels"]))]
    panels = [
        _captioned(_draw(image, side, class_names, styles), title, (kept, change))
        for side, styles, title, change in (
            (left, left_styles, titles[0], ("lost", len(lost), LOST)),
            (right, right_styles, titles[1], ("new", len(new), NEW)),
        )
    ]
    gap = panels[0].width // 60 + 4
    pair = Image.new("RGB", (panels[0].width + gap + panels[1].width, panels[0].height), _WHITE)
    pair.paste(panels[0], (0, 0))
    pair.paste(panels[1], (panels[0].width + gap, 0))
    return pair


def _draw(
    image: np.ndarray,
    detections: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    styles: Sequence[LineStyle],
) -> Image.Image:
    """Draw all boxes, then all labels, the most important last; it chooses the place of its label first.

    Broken lines, which mark a change, are more important than solid ones, then higher scores than lower ones.
    """
    picture, zoom = _enlarged(image)
    labels = [int(label) for label in detections["labels"]]
    if labels and not 1 <= min(labels) <= max(labels) <= len(class_names):
        raise ValueError(f"labels: must lie in 1..{len(class_names)}, got {min(labels)}..{max(labels)}")
    sizes = _Sizes.of(picture)
    canvas, font = ImageDraw.Draw(picture), load_font(sizes.font)
    boxes, scored = np.asarray(detections["boxes"], np.float64), "scores" in detections
    scores = np.asarray(detections["scores"] if scored else np.zeros(len(labels)), np.float64)
    is_solid = np.array([style.dashes is None for style in styles])
    ranking: list[int] = np.lexsort((-scores, is_solid)).tolist()
    shown = [(i, box) for i in ranking if (box := _visible(boxes[i], zoom, picture.size)) is not None]
    tags: list[tuple[Rectangle, str]] = []
    for i, box in shown:
        score = f" {scores[i]:.2f}" if scored else ""
        room = picture.width - 2 * sizes.pad - font.getlength(score)
        text = _shortened(class_names[labels[i] - 1], font, room) + score
        size = (round(font.getlength(text)) + 2 * sizes.pad, round(1.4 * sizes.font))
        tags.append((_free_place(box, size, picture.size, [place for place, _ in tags]), text))
    for i, box in reversed(shown):
        _outline(canvas, box, styles[i], sizes.line)
    for (i, _), ((x1, y1, x2, y2), text) in zip(reversed(shown), reversed(tags), strict=True):
        canvas.rectangle((x1, y1, x2 - 1, y2 - 1), fill=styles[i].colour, outline=_INK)
        canvas.text((x1 + sizes.pad, (y1 + y2) / 2), text, fill=_INK, font=font, anchor="lm")
    return picture


def _enlarged(image: np.ndarray) -> tuple[Image.Image, float]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    picture = Image.fromarray(image)
    zoom = max(1.0, _MIN_SIDE / max(picture.size))
    size = max(1, round(zoom * picture.width)), max(1, round(zoom * picture.height))
    return picture.resize(size, Image.Resampling.BICUBIC), zoom


def _visible(box: np.ndarray, zoom: float, size: tuple[int, int]) -> Rectangle | None:
    """Return the box in the picture's pixels, half-open, a pixel wide or more; None where it lies outside."""
    width, height = size
    x1, y1, x2, y2 = np.rint(np.clip(box * zoom, -1, max(size) + 1)).astype(int).tolist()
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(max(x2, x1 + 1), width), min(max(y2, y1 + 1), height)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _free_place(
    box: Rectangle, size: tuple[int, int], picture: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Return where a label goes: over, in or under its box, the first place that hides least of others."""
    (x1, y1, x2, y2), (w, h) = box, size
    ys, xs = (y1 - h, y1 - 1, y2 - h + 1, y2, (y1 + y2 - h) // 2), (x1 - 1, x2 - w + 1, (x1 + x2 - w) // 2)
    corner = np.array([(x, y) for y in ys for x in xs])
    corner = np.maximum(np.minimum(corner, np.subtract(picture, size)), 0)
    others = np.array(taken, dtype=np.int64).reshape(-1, 4)
    shared = np.minimum(corner[:, None] + size, others[:, 2:]) - np.maximum(corner[:, None], others[:, :2])
    x, y = corner[np.clip(shared, 0, None).prod(axis=2).sum(axis=1).argmin()].tolist()
    return x, y, x + w, y + h


def _outline(canvas: ImageDraw.ImageDraw, box: Rectangle, style: LineStyle, width: int) -> None:
    """Draw a line inside the box's edge, a dark rim on both sides; a broken line is half as wide again."""
    width = width if style.dashes is None else round(1.5 * width)
    x1, y1, x2, y2 = box
    canvas.rectangle((x1 - 1, y1 - 1, x2, y2), outline=_INK, width=width + 2)
    if style.dashes is None:
        canvas.rectangle((x1, y1, x2 - 1, y2 - 1), outline=style.colour, width=width)
        return
    dash, gap = (max(1, round(length * width)) for length in style.dashes)
    for start in range(x1, x2, dash + gap):
        stop = min(start + dash, x2) - 1
        canvas.rectangle((start, y1, stop, min(y1 + width, y2) - 1), fill=style.colour)
        canvas.rectangle((start, max(y2 - width, y1), stop, y2 - 1), fill=style.colour)
    for start in range(y1, y2, dash + gap):
        stop = min(start + dash, y2) - 1
        canvas.rectangle((x1, start, min(x1 + width, x2) - 1, stop), fill=style.colour)
        canvas.rectangle((max(x2 - width, x1), start, x2 - 1, stop), fill=style.colour)


def _shortened(text: str, font: Font, width: float) -> str:
    """Cut a text that is wider than `width` and mark the cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _captioned(picture: Image.Image, title: str, counts: Sequence[tuple[str, int, LineStyle]]) -> Image.Image:
    """Put a strip above the picture: its title, and below that each line style with its name and count."""
    sizes = _Sizes.of(picture)
    title_font, font = load_font(round(sizes.font * 1.2)), load_font(sizes.font)
    row, swatch = round(sizes.font * 1.7), 3 * sizes.font
    texts = [f"{name} {count}" for name, count, _ in counts]
    legend = [swatch + 2 * sizes.pad + round(font.getlength(text)) + sizes.font for text in texts]
    width = max(picture.width, sum(legend))
    panel = Image.new("RGB", (width, 2 * row + sizes.pad + picture.height), _WHITE)
    canvas = ImageDraw.Draw(panel)
    canvas.text((0, row / 2), _shortened(title, title_font, width), fill=_INK, font=title_font, anchor="lm")
    x = 0
    for text, advance, (_, _, style) in zip(texts, legend, counts, strict=True):
        _outline(canvas, (x + 1, row + row // 5, x + swatch, 2 * row - row // 5), style, sizes.line)
        canvas.text((x + swatch + 2 * sizes.pad, row * 1.5), text, fill=_INK, font=font, anchor="lm")
        x += advance
    panel.paste(picture, ((width - picture.width) // 2, panel.height - picture.height))
    return panel
