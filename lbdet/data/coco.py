"""Read data sets in the format of COCO: one JSON file with images, annotations and categories."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from lbdet.data.records import DetectionData, ImageRecord
from lbdet.data.voc import OtherClasses, Problem, clip_box, label_map, raise_problems, unknown_class
from lbdet.errors import UserError, closest

_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def read_coco(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    other_classes: OtherClasses = "error",
) -> DetectionData:
    """Read all images and objects of a COCO file, in the file's order.

    A crowd region becomes a difficult object, which is not trained on. A box without width or height is left
    out: the official train2017 has two. A box that leaves the image by one pixel or less is clipped.

    Args:
        images: the folder of the images; `file_name` may add subfolders.
        annotations: the JSON file.
        classes: label k is `classes[k - 1]`; None = the file's categories in the order of their ids.
        other_classes: whether an object of a category outside `classes` is an error or is left out.

    Raises:
        UserError: with all problems of the file (the first ten spelled out).
    """
    if not os.path.isdir(images):
        raise UserError(f"{images}: folder of the images does not exist")
    content = _read_json(annotations)
    raise_problems(annotations, _malformed(content))
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    names: dict[int | str, str] = {key: coco.cats[key]["name"] for key in sorted(coco.cats)}
    labels = label_map(list(names.values()) if classes is None else classes)
    _check_classes(annotations, labels, names)
    records, problems = [], _dangling(coco)
    listings: dict[str, frozenset[str]] = {}
    for image in content["images"]:
        problems += _image_problems(Path(images), image, listings)
        objects, found = _objects(image, coco.imgToAnns[image["id"]], names, labels, other_classes)
        problems += found
        records.append(_record(Path(images), image, objects))
    raise_problems(annotations, problems)
    return DetectionData(tuple(labels), tuple(records), train_on_difficult=False)


def _read_json(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path}: must be JSON, got {error}") from error


def _malformed(content: Any) -> list[Problem]:
    """List missing and repeated entries, without which an index cannot be made."""
    if not isinstance(content, dict):
        return [("top level", f"must be an object, got {type(content).__name__}")]
    problems = []
    for part, keys in _KEYS.items():
        rows = content.get(part)
        if not isinstance(rows, list):
            problems.append((part, f"must be a list, got {type(rows).__name__}"))
            continue
        ids: set[int | str] = set()
        for number, row in enumerate(rows):
            problem = _malformed_row(row, keys, ids)
            if problem:
                problems.append((f"{part}[{number}]", problem))
    if not problems and not content["images"]:
        problems.append(("images", "must not be empty, got none"))
    return problems


def _malformed_row(row: Any, keys: Sequence[str], ids: set[int | str]) -> str:
    """Return what is wrong with one entry, or ""; its id is added to `ids`."""
    if not isinstance(row, dict):
        return f"must be an object, got {type(row).__name__}"
    for key in keys:
        if key not in row:
            return f"must have {key!r}, got {sorted(row)}"
        if key.endswith("id") and not isinstance(row[key], int | str):
            return f"{key} must be a number or a text, got {row[key]!r}"
        if key.endswith("name") and not isinstance(row[key], str):
            return f"{key} must be a text, got {row[key]!r}"
        if key in ("width", "height") and not (isinstance(row[key], int) and row[key] > 0):
            return f"{key} must be a positive integer, got {row[key]!r}"
    if row["id"] in ids:
        return f"id must be unique, got {row['id']!r} again"
    ids.add(row["id"])
    return ""


def _check_classes(
    path: str | os.PathLike[str], labels: Mapping[str, int], names: Mapping[int | str, str]
) -> None:
    """Refuse a class that is no category: it would silently have no objects."""
    there = set(names.values())
    raise_problems(
        path,
        [
            ("classes", f"must be categories of the file, got {name!r}{closest(name, there)}")
            for name in labels
            if name not in there
        ],
    )


def _dangling(coco: COCO) -> list[Problem]:
    """List annotations of images that are not in the file."""
    return [
        (f"annotation {row['id']}", f"image_id must be the id of an image, got {row['image_id']!r}")
        for row in coco.dataset["annotations"]
        if row["image_id"] not in coco.imgs
    ]


def _image_problems(
    folder: Path, image: Mapping[str, Any], listings: dict[str, frozenset[str]]
) -> list[Problem]:
    """Check that the image file is there and inside `folder`; `listings` remembers each folder's files."""
    path = PurePosixPath(image["file_name"])
    if path.is_absolute() or ".." in path.parts:
        return [(f"image {image['id']}", f"file_name must stay inside the images' folder, got {str(path)!r}")]
    parent = str(path.parent)
    if parent not in listings:
        listings[parent] = (
            frozenset(os.listdir(folder / parent)) if (folder / parent).is_dir() else frozenset()
        )
    if path.name not in listings[parent]:
        return [(f"image {image['id']}", f"file_name must exist in {folder}, got {str(path)!r}")]
    return []


def _objects(
    image: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[int | str, str],
    labels: Mapping[str, int],
    other_classes: OtherClasses,
) -> tuple[list[tuple[tuple[float, float, float, float], int, bool]], list[Problem]]:
    """Return (box, label, crowd) of an image's annotations, and the problems of those that have one."""
    objects, problems = [], []
    for row in rows:
        try:
            if row["category_id"] not in names:
                raise UserError(f"category_id must be the id of a category, got {row['category_id']!r}")
            name = names[row["category_id"]]
            if name in labels:
                box = _box(row["bbox"], image["width"], image["height"])
                if box is not None:
                    objects.append((box, labels[name], row.get("iscrowd", 0) == 1))
            elif other_classes == "error":
                raise unknown_class(name, labels)
        except UserError as error:
            problems.append((f"annotation {row['id']}", str(error)))
    return objects, problems


def _box(bbox: Any, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Return `(x1, y1, x2, y2)` of COCO's `[x, y, width, height]`; None for a box without area."""
    numbers = isinstance(bbox, list) and all(isinstance(value, int | float) for value in bbox)
    if not numbers or len(bbox) != 4 or not all(math.isfinite(value) for value in bbox):
        raise UserError(f"bbox must be four numbers, got {bbox!r}")
    x, y, w, h = bbox
    if w < 0 or h < 0:
        raise UserError(f"bbox must not have a negative width or height, got {bbox}")
    if np.float32(x + w) == np.float32(x) or np.float32(y + h) == np.float32(y):
        return None
    box = clip_box((x, y, x + w, y + h), width, height)
    if box is None:
        raise UserError(f"bbox must lie inside the image of {width}x{height}, got {bbox}")
    return box


def _record(
    folder: Path,
    image: Mapping[str, Any],
    objects: Sequence[tuple[tuple[float, float, float, float], int, bool]],
) -> ImageRecord:
    return ImageRecord(
        id=str(image["id"]),
        path=str(folder / image["file_name"]),
        width=image["width"],
        height=image["height"],
        boxes=np.array([box for box, _, _ in objects], dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for _, label, _ in objects], dtype=np.int64),
        difficult=np.array([crowd for _, _, crowd in objects], dtype=bool),
    )
