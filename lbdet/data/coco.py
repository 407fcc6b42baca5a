"""Read data sets in the format of COCO: one JSON file with images, annotations and categories."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lbdet.data.files import read_json
from lbdet.data.problems import Box, Broken, Problem, Scan, problem, raise_problems
from lbdet.data.records import DetectionData, ImageRecord
from lbdet.data.voc import OtherClasses, clip_box, label_map, record_of, unknown_class
from lbdet.errors import UserError, closest, short
from lbdet.images import check_pixels

MAX_COCO = 2 << 30
"""Bytes of an annotation file; train2017's has a fifth. Reading takes some ten times a file's size."""
_HUGE = 1e30  # no coordinate; nan and inf are not less, and a sum of two still fits float32
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
    return scan_coco(images, annotations, classes, other_classes).whole(annotations)


def scan_coco(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    other_classes: OtherClasses = "error",
) -> Scan[DetectionData]:
    """Read what can be read, and list all problems. Args as for `read_coco`.

    Raises:
        UserError: a missing folder, a file that is no JSON with the three lists, bad categories or classes.
    """
    if not os.path.isdir(images):
        raise UserError(f"{images}: folder of the images does not exist")
    content = read_json(annotations, MAX_COCO)
    rows, problems = well_formed(annotations, content)
    names = {row["id"]: row["name"] for row in sorted(rows["categories"], key=_by_id)}
    try:
        labels = label_map(list(names.values()) if classes is None else classes)
    except UserError as error:
        raise UserError(f"{annotations}: {error}") from None
    _check_classes(annotations, labels, names)
    of_image: dict[int | str, list[Any]] = {row["id"]: [] for row in rows["images"]}
    for row in rows["annotations"]:
        if row["image_id"] in of_image:
            of_image[row["image_id"]].append(row)
        elif len(of_image) == len(content["images"]):  # else it may be that of an image with a problem
            rule = f"image_id must be the id of an image, got {short(row['image_id'])}"
            problems.append(Problem(f"annotation {row['id']}", rule))
    records = []
    listings: dict[str, frozenset[str]] = {}
    for image in rows["images"]:
        record, found = _record(
            Path(images), image, of_image[image["id"]], names, labels, other_classes, listings
        )
        problems += found
        records += [record] if record else []
    data = DetectionData(tuple(labels), tuple(records), train_on_difficult=False)
    return Scan(data, tuple(problems))


def _by_id(row: Mapping[str, Any]) -> tuple[bool, int | str]:
    return isinstance(row["id"], str), row["id"]


def well_formed(
    path: str | os.PathLike[str], content: Any
) -> tuple[dict[str, list[dict[str, Any]]], list[Problem]]:
    """Return the entries of the three lists that have what they need, and what is wrong with the others.

    Raises:
        UserError: a list is missing, there is no image, or a category has a problem.
    """
    if not isinstance(content, dict):
        raise UserError(f"{path}: top level: must be an object, got {type(content).__name__}")
    missing = [
        Problem(part, f"must be a list, got {type(content.get(part)).__name__}")
        for part in _KEYS
        if not isinstance(content.get(part), list)
    ]
    raise_problems(path, missing)
    if not content["images"]:
        raise UserError(f"{path}: images: must not be empty, got none")
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in _KEYS}
    problems: list[Problem] = []
    for part, keys in _KEYS.items():
        ids: set[str] = set()
        for place, row in enumerate(content[part]):
            rule = _malformed(row, keys, ids)
            if rule:
                problems.append(Problem(f"{part}[{place}]", rule))
            else:
                rows[part].append(row)
    raise_problems(path, [found for found in problems if found.where.startswith("categories")])
    return rows, problems


def _malformed(row: Any, keys: Sequence[str], ids: set[str]) -> str:
    """Return what is wrong with one entry, or ""; its id is added to `ids`."""
    if not isinstance(row, dict):
        return f"must be an object, got {type(row).__name__}"
    for key in keys:
        if key not in row:
            return f"must have {key!r}, got {sorted(row)}"
        value = row[key]
        if key.endswith("id") and (isinstance(value, bool) or not isinstance(value, int | str)):
            return f"{key} must be a whole number or a text, got {short(value)}"
        if key.endswith("name") and not isinstance(value, str):
            return f"{key} must be a text, got {short(value)}"
        if isinstance(value, str) and not _is_unicode(value):
            return f"{key} must be valid Unicode, got {short(value)}"
        if key in ("width", "height") and not (type(value) is int and value > 0):
            return f"{key} must be a positive integer, got {short(value)}"
    shown = str(row["id"])
    if shown in ids:
        return f"id must be unique, got {short(row['id'])} again"
    ids.add(shown)
    return ""


def _is_unicode(text: str) -> bool:
    """Tell whether a text can be written to a file: JSON lets halves of surrogate pairs through."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_classes(
    path: str | os.PathLike[str], labels: Mapping[str, int], names: Mapping[int | str, str]
) -> None:
    """Refuse a class that is no category: it would silently have no objects."""
    there = set(names.values())
    raise_problems(
        path,
        [
            Problem(
                "classes", f"must be categories of the file, got {short(name)}{closest(name[:60], there)}"
            )
            for name in labels
            if name not in there
        ],
    )


def _record(
    folder: Path,
    image: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[int | str, str],
    labels: Mapping[str, int],
    other_classes: OtherClasses,
    listings: dict[str, frozenset[str]],
) -> tuple[ImageRecord | None, list[Problem]]:
    """Return the record of an image with those of its objects that have no problem, and all problems.

    Args:
        rows: its annotations.
        listings: remembers the files of each folder.
    """
    try:
        check_pixels("size", image["width"], image["height"])
        path = _image_file(folder, image["file_name"], listings)
    except UserError as error:
        return None, [problem(f"image {image['id']}", error)]
    objects: list[tuple[Box, int, bool]] = []
    problems = []
    for row in rows:
        try:
            if row["category_id"] not in names:
                raise UserError(f"category_id must be the id of a category, got {short(row['category_id'])}")
            name = names[row["category_id"]]
            if name in labels:
                box = _box(row["bbox"], image["width"], image["height"])
                if box is not None:
                    objects.append((box, labels[name], row.get("iscrowd", 0) == 1))
            elif other_classes == "error":
                raise unknown_class(name, labels, _box_if_right(row["bbox"], image["width"], image["height"]))
        except UserError as error:
            problems.append(problem(f"annotation {row['id']}", error, path))
    return record_of(str(image["id"]), path, image["width"], image["height"], objects), problems


def _image_file(folder: Path, file_name: str, listings: dict[str, frozenset[str]]) -> str:
    """Return the path of an image's file, which must be there and inside `folder`."""
    path = PurePosixPath(file_name)
    if path.is_absolute() or ".." in path.parts:
        raise Broken("no image", f"file_name must stay inside the images' folder, got {short(str(path))}")
    parent = str(path.parent)
    if parent not in listings:
        listings[parent] = _files(folder / parent)
    if path.name not in listings[parent]:
        raise Broken("no image", f"file_name must exist in {folder}, got {short(str(path))}")
    return str(folder / file_name)


def _files(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # no such folder; a name too long or with a NUL
        return frozenset()


def _box(bbox: Any, width: int, height: int) -> Box | None:
    """Return `(x1, y1, x2, y2)` of COCO's `[x, y, width, height]`; None for a box without area."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise UserError(f"bbox must be four numbers, got {short(bbox)}")
    x, y, w, h = bbox
    if w < 0 or h < 0:
        rule = f"bbox must not have a negative width or height, got {short(bbox)}"
        raise Broken("box", rule, (x, y, x + w, y + h))
    if np.float32(x + w) == np.float32(x) or np.float32(y + h) == np.float32(y):
        return None
    box = clip_box((x, y, x + w, y + h), width, height)
    if box is None:
        rule = f"bbox must lie inside the image of {width}x{height}, got {short(bbox)}"
        raise Broken("box", rule, (x, y, x + w, y + h))
    return box


def _box_if_right(bbox: Any, width: int, height: int) -> Box | None:
    try:
        return _box(bbox, width, height)
    except UserError:
        return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _HUGE
