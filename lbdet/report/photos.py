"""Which boxes does a width keep, lose or add on a few photographs? Read from files; no model is run.

status  box of          drawn
K       the width       solid        kept: float has it too
L       float           dashed       lost
N       the width       dotted       new
-       the width       solid        there is no float cell to compare with
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from lbdet.data.coco import MAX_COCO
from lbdet.data.images import read_image
from lbdet.data.records import DetectionData, ImageRecord, spread_images
from lbdet.errors import UserError, short
from lbdet.metrics.diff import diff_detections
from lbdet.report.sweep_file import read_json

LONG_SIDE, QUALITY = 480, 80
Found: TypeAlias = dict[str, np.ndarray]
"""The detections of one image: `{"boxes": [N, 4], "labels": [N], "scores": [N]}`."""
BoxRow: TypeAlias = tuple[str, int, float, float, float, float, float | None, float | None]
"""Status, label - 1, x1, y1, x2, y2 in pixels of the picture, score of float, score of the width."""


@dataclass(frozen=True)
class Photo:
    """A photograph as the page shows it."""

    id: str
    jpeg: bytes
    width: int
    """in pixels of the picture, as the height"""
    height: int
    scale: tuple[float, float]
    """pixels of the picture in one of the file, across and down"""
    objects: str
    """what the data set says is on it"""


def choose_photos(data: DetectionData, count: int) -> DetectionData:
    """Return `count` images spread over the data set: those with objects, and others only if they are few."""
    with_objects = [i for i, record in enumerate(data.records) if len(record.labels)]
    empty = [i for i, record in enumerate(data.records) if not len(record.labels)]
    chosen = spread_images(data.take(with_objects), count)
    rest = spread_images(data.take(empty), max(count - len(chosen), 0)) if len(chosen) < count else None
    places = {record.id: i for i, record in enumerate(data.records)}
    ids = [record.id for part in (chosen, rest) if part is not None for record in part.records]
    return data.take(sorted(places[name] for name in ids))


def read_photo(record: ImageRecord, classes: Sequence[str]) -> Photo:
    """Read an image and make it small: at most 480 pixels long, JPEG.

    Raises:
        UserError: a file that is missing or damaged.
    """
    image = Image.fromarray(read_image(record.path))
    zoom = min(1.0, LONG_SIDE / max(image.size))
    width, height = (max(1, round(zoom * side)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS) if zoom < 1 else image
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    counts = Counter(classes[label - 1] for label in record.labels.tolist())
    objects = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no objects"
    scale = (width / image.width, height / image.height)
    return Photo(record.id, file.getvalue(), width, height, scale, objects)


def read_detections(path: Path, ids: Sequence[str], num_classes: int, threshold: float) -> list[Found]:
    """Read what a run found on some images.

    Args:
        path: a `detections.json` in COCO's results format, whose categories are labels.
        ids: of the images.
        threshold: least score.

    Raises:
        UserError: the file is not there, or is not of this format.
    """
    rows = read_json(path, MAX_COCO)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "image_id" in row for row in rows):
        raise UserError(f"{path}: must be a list of detections with their image_id, got something else")
    by_image: dict[str, list[list[float]]] = {name: [] for name in ids}
    for number, row in enumerate(rows):
        found = by_image.get(str(row["image_id"]))
        if found is None:
            continue
        values = _detection(row, num_classes)
        if values is None:
            raise UserError(
                f"{path}: entry {number}: must have a category_id in 1..{num_classes}, a bbox of 4 numbers "
                f"and a score, got {short(row)}"
            )
        if values[0] >= threshold:
            found.append(values)
    return [_as_found(by_image[name]) for name in ids]


def compare(reference: Found | None, found: Found, photo: Photo) -> list[BoxRow]:
    """List the boxes of one photograph: kept, lost and new against `reference`, in this order."""
    ours = [_scaled(found, i, photo) for i in range(len(found["labels"]))]
    if reference is None:
        return [("-", *box, None, score) for box, score in ours]
    theirs = [_scaled(reference, i, photo) for i in range(len(reference["labels"]))]
    diff = diff_detections(reference, found)
    kept: list[BoxRow] = [("K", *ours[j][0], theirs[i][1], ours[j][1]) for i, j in diff.kept.tolist()]
    lost: list[BoxRow] = [("L", *theirs[i][0], theirs[i][1], None) for i in diff.lost.tolist()]
    return kept + lost + [("N", *ours[j][0], None, ours[j][1]) for j in diff.new.tolist()]


def _detection(row: dict[str, Any], num_classes: int) -> list[float] | None:
    """Return [score, label, x1, y1, x2, y2] of an entry, or None for one that is wrong."""
    try:
        x, y, width, height = (float(value) for value in row["bbox"])
        values = [float(row["score"]), row["category_id"], x, y, x + width, y + height]
        is_right = row["category_id"] in range(1, num_classes + 1) and all(map(math.isfinite, values))
        return values if is_right else None
    except (TypeError, ValueError, KeyError):
        return None


def _as_found(rows: Sequence[Sequence[float]]) -> Found:
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return {"boxes": table[:, 2:], "labels": table[:, 1].astype(np.int64), "scores": table[:, 0]}


def _scaled(found: Found, i: int, photo: Photo) -> tuple[tuple[int, float, float, float, float], float]:
    """Return (label - 1, x1, y1, x2, y2) in pixels of the picture, and the score."""
    across, down = photo.scale
    x1, y1, x2, y2 = (found["boxes"][i] * (across, down, across, down)).round(1).tolist()
    return (int(found["labels"][i]) - 1, x1, y1, x2, y2), round(float(found["scores"][i]), 3)
