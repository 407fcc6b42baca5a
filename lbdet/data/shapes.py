"""A small synthetic PASCAL VOC devkit: six classes of textured, shaded, tilted shapes that overlap.

It answers the question "does the whole chain work here?" in a minute, with nothing to download. Colour and
texture say nothing about the class; only the outline does. A scene is a pure function of `(seed, split,
index)`, so more images never change the earlier ones; only the JPEG bytes depend on the version of Pillow.

Each shape is a signed distance function, negative inside: one array gives the anti-aliased outline, the bevel
and the shadow.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from lbdet.data.records import DetectionData
from lbdet.data.voc import read_voc
from lbdet.errors import UserError

VERSION = 1
"""Goes up whenever the same parameters would give other pictures."""
MARKER = "shapes.json"
"""The file in the devkit's root that records what it was rendered from."""
SIZE = (192, 160)
"""Default width and height in pixels."""
SPLITS = ("train", "val")

DROPPED_BELOW = 0.15
"""Visible share of its area under which an object is painted but not annotated."""
DIFFICULT_BELOW = 0.40
"""Visible share of its area under which an object is marked difficult."""

_MAX_OBJECTS = 5
_DIAMETERS = (0.22, 0.60)  # of the shorter side
# Of the shorter side, drawn around the picture: an object that leaves it still has its full area.
_MARGIN = 0.35


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wedge = math.pi / 5
    # 0 at a point of the star, `wedge` between two.
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
    inner_x, inner_y = 0.42 * math.cos(wedge), 0.42 * math.sin(wedge)
    length = math.hypot(1 - inner_x, inner_y)
    radius = np.hypot(x, y)
    side = ((radius * np.cos(angle) - 1) * inner_y + radius * np.sin(angle) * (1 - inner_x)) / length
    return np.maximum(side, radius - 1)  # the second keeps shadows from growing spikes at the points


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sides = np.maximum(y, np.abs(x) * math.sin(math.pi / 3) - y / 2) - 0.5
    return np.maximum(sides, np.hypot(x, y) - 1)


_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.92,
    "square": lambda x, y: _box(x, y, 0.78, 0.78),
    "triangle": _triangle,
    "star": _star,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.70) - 0.22,
    "cross": lambda x, y: np.minimum(_box(x, y, 0.96, 0.28), _box(x, y, 0.28, 0.96)),
}
"""Class -> signed distance to the outline of a shape that fits a circle of about radius 1 at the origin."""

SHAPE_CLASSES: tuple[str, ...] = tuple(_OUTLINES)


def _colour(rng: np.random.Generator, hue: float, saturation: tuple[float, float]) -> np.ndarray:
    """Draw a colour of about this hue; float32 `[3]` in [0, 1]."""
    pure = np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    grey = rng.uniform(*saturation)
    return (rng.uniform(0.35, 0.95) * (1 - grey + grey * pure)).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Sum smooth noise over five octaves; float32 `[height, width]`, mean about 0, within about +-1."""
    total = np.zeros((height, width), np.float32)
    for octave in range(5):
        grid = Image.fromarray(rng.uniform(-1, 1, (3 << octave, 3 << octave)).astype(np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) * 0.6**octave
    return total / 2


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw one of five patterns at a random angle and period; float32 `[height, width]` in about [-1, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, 2 * math.pi), rng.uniform(7, 26)
    u = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period) + rng.uniform(0, 2 * math.pi)
    v = (y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period)
    kind = rng.choice(["plain", "gradient", "stripes", "checks", "dots"])
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    if kind == "gradient":
        return 2 * (u - u.min()) / (u.max() - u.min()) - 1
    waves = {"stripes": np.sin(u), "checks": np.sin(u) * np.sin(v), "dots": np.cos(u) + np.cos(v) - 0.7}[kind]
    return np.tanh(4 * waves)


def _texture(
    rng: np.random.Generator, height: int, width: int, saturation: tuple[float, float], contrast: float
) -> np.ndarray:
    """Draw two colours mixed by a pattern and noise; float32 `[height, width, 3]` in about [0, 1].

    Args:
        saturation: range that both colours' saturation is drawn from, within [0, 1].
        contrast: how strongly the pattern mixes them; 0.5 takes a pattern of +-1 to the pure colours.
    """
    hue = rng.uniform()
    first = _colour(rng, hue, saturation)
    second = _colour(rng, hue + rng.normal(0, 0.15), saturation)
    noise = _noise(rng, height, width)
    mix = np.clip(0.5 + contrast * (_pattern(rng, height, width) + noise), 0, 1)[..., None]
    return (first * mix + second * (1 - mix)) * (1 + 0.2 * noise[::-1, ::-1, None])


@dataclass(frozen=True)
class ShapeObject:
    """One annotated shape of a scene."""

    name: str
    visible: np.ndarray
    """bool `[height, width]`: the pixels of the picture that are its own; never empty"""
    area: int
    """pixels of the whole shape, with what is covered or beyond the picture's edge"""
    truncated: bool
    """part of it lies beyond the picture's edge"""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """`(x1, y1, x2, y2)`, half-open, 0-based pixels: the extent of what is visible, not of the whole."""
        columns, rows = np.flatnonzero(self.visible.any(0)), np.flatnonzero(self.visible.any(1))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @property
    def visibility(self) -> float:
        """The visible share of the area, in (0, 1]."""
        return float(self.visible.sum() / self.area)

    @property
    def difficult(self) -> bool:
        """Too little of it is visible to demand that it is found."""
        return self.visibility < DIFFICULT_BELOW


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 `[height, width, 3]`, and its annotated objects, the farthest first."""

    image: np.ndarray
    objects: tuple[ShapeObject, ...]


def draw_scene(seed: int, split: str, index: int, size: tuple[int, int] = SIZE) -> Scene:
    """Draw image `index` of `split`; a pure function of its arguments.

    One to five objects are painted, each over those before it. Visible is what no later object covers and the
    picture's edge does not cut off. At least one object is annotated: the last is never covered.

    Args:
        split: `train` or `val`.
        size: width and height in pixels.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    width, height = size
    margin = int(_MARGIN * min(size)) + 2
    picture = slice(margin, margin + height), slice(margin, margin + width)
    canvas = np.pad(
        _texture(rng, height, width, (0.0, 0.4), 0.35), ((margin, margin), (margin, margin), (0, 0))
    )
    light = rng.uniform(0, 2 * math.pi)
    painted = [_paint(rng, canvas, picture, light) for _ in range(rng.integers(1, _MAX_OBJECTS + 1))]
    return Scene(_photograph(rng, canvas[picture], light), _annotate(painted, picture))


def _annotate(painted: list[tuple[str, np.ndarray]], picture: tuple[slice, slice]) -> tuple[ShapeObject, ...]:
    """Return the objects of which enough is visible.

    Args:
        painted: class and whole mask on the canvas, in painting order.
        picture: rows and columns of the canvas that the picture shows.
    """
    objects = []
    covered = np.zeros_like(painted[0][1])
    for name, whole in reversed(painted):
        visible = (whole & ~covered)[picture]
        covered |= whole
        area, within = int(whole.sum()), int(whole[picture].sum())
        if visible.sum() >= DROPPED_BELOW * area:
            objects.append(ShapeObject(name, visible, area, truncated=within < area))
    return tuple(reversed(objects))


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, picture: tuple[slice, slice], light: float
) -> tuple[str, np.ndarray]:
    """Paint a random object over the canvas in place; return its class and its whole mask on the canvas."""
    name = SHAPE_CLASSES[rng.integers(len(SHAPE_CLASSES))]
    shorter = min(side.stop - side.start for side in picture)
    radius = math.exp(rng.uniform(*np.log(_DIAMETERS))) * shorter / 2
    inset = 0.7 * radius  # the picture's edge cuts off little
    centre_y, centre_x = (rng.uniform(side.start + inset, side.stop - inset) for side in picture)
    turn, squeeze = rng.uniform(-0.45, 0.45), rng.uniform(0.8, 1)
    left, top, extent = int(centre_x - 1.6 * radius), int(centre_y - 1.6 * radius), int(3.2 * radius) + 2
    window = slice(top, top + extent), slice(left, left + extent)
    y, x = np.mgrid[window].astype(np.float32) + 0.5

    def distance(shift_x: float, shift_y: float) -> np.ndarray:
        dx, dy = x - centre_x - shift_x, y - centre_y - shift_y
        u = dx * math.cos(turn) + dy * math.sin(turn)
        v = (dy * math.cos(turn) - dx * math.sin(turn)) / squeeze
        return _OUTLINES[name](u / radius, v / radius) * radius

    light_x, light_y = math.cos(light), math.sin(light)
    edge = distance(0, 0)
    away = 0.10 * radius + 1.5  # pixels by which the shadow falls away from the light
    shadow = distance(-away * light_x, -away * light_y)
    canvas[window] *= 1 - 0.5 * np.clip(0.5 - shadow / (2 * away), 0, 1)[..., None]
    slope_y, slope_x = np.gradient(edge)
    bevel = np.exp(np.minimum(edge, 0) / (0.12 * radius)) * (slope_x * light_x + slope_y * light_y)
    body = _texture(rng, extent, extent, (0.5, 1.0), 0.2) * (1.05 + 0.4 * bevel[..., None])
    canvas[window] += (body - canvas[window]) * np.clip(0.5 - edge, 0, 1)[..., None]
    whole = np.zeros(canvas.shape[:2], bool)
    whole[window] = edge < 0
    return name, whole


def _photograph(rng: np.random.Generator, scene: np.ndarray, light: float) -> np.ndarray:
    """Add uneven light, a little blur and sensor noise to a float32 `[height, width, 3]`; return uint8."""
    height, width = scene.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    lit = scene * (1 + rng.uniform(0, 0.25) * (x * math.cos(light) + y * math.sin(light)))[..., None]
    sharp = Image.fromarray((np.clip(lit, 0, 1) * 255).astype(np.uint8))
    soft = np.asarray(sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9))), np.float32)
    noisy = soft + rng.uniform(0, 7) * rng.standard_normal(soft.shape, np.float32)
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)


def render_shapes(
    root: str | Path, seed: int = 0, train: int = 1000, val: int = 200, size: tuple[int, int] = SIZE
) -> None:
    """Render the devkit `root/VOC2012`, about 15 seconds; nothing happens if it is there already.

    The folder appears whole or not at all: it is rendered beside `root` and renamed. Several processes may
    call this at once.

    Args:
        train, val: number of images.
        size: width and height in pixels.

    Raises:
        UserError: a count below 1, or `root` holds anything else, which is never overwritten.
    """
    root = Path(root)
    counts = {"train": train, "val": val}
    wanted = json.dumps({"version": VERSION, "seed": seed, **counts, "size": size})
    for split, count in counts.items():
        if count < 1:
            raise UserError(f"{root}: {split} must be at least 1 image, got {count}; give a larger number")
    if _is_rendered(root, wanted):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        devkit = Path(scratch) / "devkit"
        for split, count in counts.items():
            _write_split(devkit / "VOC2012", seed, split, count, size)
        (devkit / MARKER).write_text(wanted)
        try:
            devkit.rename(root)
        except OSError:  # another process was faster
            if not _is_rendered(root, wanted):
                raise


def read_shapes(
    root: str | Path, splits: Sequence[str] = ("train",), seed: int = 0, train: int = 1000, val: int = 200
) -> DetectionData:
    """Read splits (`train`, `val`) of the devkit at `root`, after `render_shapes`; raise what it raises."""
    render_shapes(root, seed, train, val)
    return read_voc(root, [f"2012:{split}" for split in splits], SHAPE_CLASSES)


def _is_rendered(root: Path, wanted: str) -> bool:
    """Say whether `root` holds the devkit whose marker is `wanted`; a UserError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    marker = root / MARKER
    if not marker.is_file():
        raise UserError(
            f"{root}: must be absent, empty or a rendered devkit, got a folder or file without {MARKER}; "
            "name another folder"
        )
    if (found := marker.read_text()) != wanted:
        raise UserError(f"{marker}: must be {wanted}, got {found}; remove {root} or name another folder")
    return True


def _write_split(year: Path, seed: int, split: str, count: int, size: tuple[int, int]) -> None:
    """Write the images, annotations and the id list of one split under the VOC folder `year`."""
    images, annotations, lists = year / "JPEGImages", year / "Annotations", year / "ImageSets" / "Main"
    for folder in (images, annotations, lists):
        folder.mkdir(parents=True, exist_ok=True)
    ids = [f"{split}_{index:05d}" for index in range(count)]
    for index, name in enumerate(ids):
        scene = draw_scene(seed, split, index, size)
        Image.fromarray(scene.image).save(images / f"{name}.jpg", quality=90)
        (annotations / f"{name}.xml").write_text(_annotation(f"{name}.jpg", scene))
    (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))


def _annotation(filename: str, scene: Scene) -> str:
    """Write a scene as VOC's XML, whose pixels are numbered from 1 and whose xmax, ymax belong to the box."""
    height, width, depth = scene.image.shape
    lines = [
        "<annotation>",
        f"  <folder>VOC2012</folder><filename>{filename}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>{depth}</depth></size>",
    ]
    for shape in scene.objects:
        x1, y1, x2, y2 = shape.box
        flags = f"<truncated>{shape.truncated:d}</truncated><difficult>{shape.difficult:d}</difficult>"
        corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        lines.append(f"  <object><name>{shape.name}</name>{flags}<bndbox>{corners}</bndbox></object>")
    return "\n".join([*lines, "</annotation>\n"])
