"""Read data sets in the layout of PASCAL VOC, every annotation checked before the first batch.

A VOC folder holds `JPEGImages/`, `Annotations/` and `ImageSets/Main/`; a devkit holds one such folder a year.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
import numpy as np
import torchvision

from lbdet.data.files import read_bytes, read_text, reason
from lbdet.data.problems import Box, Broken, Problem, Scan, problem
from lbdet.data.records import DetectionData, ImageRecord
from lbdet.errors import UserError, closest, one_line, short
from lbdet.images import check_pixels

OtherClasses = Literal["error", "ignore"]

MAX_XML, MAX_SPLIT = 4 << 20, 16 << 20
"""Bytes of an annotation (some 15 000 objects) and of the list of a split (some million images)."""
_SUFFIXES = (".jpg", ".jpeg", ".png")
_TOLERANCE = 1.0  # pixels: 0-based annotations give x1 = -1, rounded ones stick out by a fraction
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DOWNLOADS = {"2007": ("trainval", "test"), "2012": ("trainval",)}


def read_voc(
    root: str | os.PathLike[str],
    splits: Sequence[str],
    classes: Sequence[str],
    other_classes: OtherClasses = "error",
) -> DetectionData:
    """Read the images and objects that `splits` list, in their order.

    The image of an annotation is the file of the same name in JPEGImages; `<filename>` is not believed. An id
    is that name; where the splits span several years it is `year_name`. A box that leaves the image by one
    pixel or less is clipped.

    Args:
        root: a devkit (holds VOC2007/, or VOCdevkit/VOC2007/, ...) or one VOC folder.
        splits: `year:split`, such as `2007:trainval`, for a devkit; bare `split` for one VOC folder. A split
            that ends with `.txt` is the path of a list that lies elsewhere.
        classes: label k is `classes[k - 1]`.
        other_classes: whether an object of another class is an error or is left out.

    Raises:
        UserError: with all problems of all files (the first ten spelled out).
    """
    return scan_voc(root, splits, classes, other_classes).whole(root)


def scan_voc(
    root: str | os.PathLike[str],
    splits: Sequence[str],
    classes: Sequence[str],
    other_classes: OtherClasses = "error",
) -> Scan[DetectionData]:
    """Read what can be read, and list all problems. Args as for `read_voc`.

    Raises:
        UserError: a class stands twice in `classes`.
    """
    root = Path(root)
    labels = label_map(classes)
    several_years = len({split.partition(":")[0] for split in splits if ":" in split}) > 1
    records: dict[str, ImageRecord] = {}
    problems: list[Problem] = []
    for split in splits:
        try:
            year, folder, names = read_split(root, split)
        except UserError as error:
            problems.append(Problem(f"split {short(split)}", str(error)))
            continue
        prefix = f"{year}_" if several_years and year else ""
        images = _image_files(folder)
        for name in names:
            if prefix + name in records:
                rule = f"an image must be listed once, got {short(name)} twice"
                problems.append(Problem(f"split {short(split)}", rule, "listed twice"))
            elif name not in images:
                rule = f"must have an image {name}.jpg (or .jpeg, .png), got none"
                problems.append(Problem(f"{_short(root, folder)}JPEGImages", rule, "no image"))
            else:
                path = os.path.join(folder, "Annotations", f"{name}.xml")
                where = f"{_short(root, folder)}Annotations/{name}.xml"
                image = os.path.join(folder, "JPEGImages", images[name])
                record, found = _read_annotation(path, where, prefix + name, image, labels, other_classes)
                problems.extend(found)
                if record is not None:
                    records[record.id] = record
    return Scan(DetectionData(classes=tuple(classes), records=tuple(records.values())), tuple(problems))


def download_voc(root: str | os.PathLike[str], year: str) -> None:
    """Download VOC 2007 (trainval and test) or 2012 (trainval) into `root/VOCdevkit`, MD5 checked.

    Raises:
        UserError: for another year, and where the network or the disk fails.
    """
    if year not in _DOWNLOADS:
        raise UserError(f"year: must be one of {', '.join(_DOWNLOADS)}, got {year!r}")
    for split in _DOWNLOADS[year]:
        try:
            torchvision.datasets.VOCDetection(str(root), year=year, image_set=split, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise UserError(
                f"{root}: download of VOC{year} {split} failed, got {type(error).__name__}: {error}; "
                "try again, or unpack the official archive there by hand"
            ) from error


def label_map(classes: Sequence[str]) -> dict[str, int]:
    """Return class name -> label, 1 for the first. A name given twice is a UserError."""
    for name, count in Counter(classes).items():
        if count > 1:
            raise UserError(f"classes: names must differ, got {short(name)} more than once")
    return {name: label for label, name in enumerate(classes, start=1)}


def unknown_class(name: str, labels: Mapping[str, int], box: Box | None = None) -> Broken:
    """Return the error for an object of a class that is not in the list."""
    return Broken(
        "class",
        f"class must be one of the {len(labels)} classes, got {short(name)}; "
        f"add it to classes or set other_classes: ignore{_closest(name[:60], tuple(labels))}",
        box,
    )


@lru_cache(maxsize=4096)  # a data set may have a million objects of a few other classes
def _closest(name: str, names: tuple[str, ...]) -> str:
    return closest(name, names)


def clip_box(box: Sequence[float], width: int, height: int) -> Box | None:
    """Clip `(x1, y1, x2, y2)` to the image; None where it is more than a pixel outside or nothing remains.

    What remains has an area in float32, too: x1 < x2 and y1 < y2 there.
    """
    x1, y1, x2, y2 = box
    if min(x1, y1) < -_TOLERANCE or x2 > width + _TOLERANCE or y2 > height + _TOLERANCE:
        return None
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return (x1, y1, x2, y2) if _less(x1, x2) and _less(y1, y2) else None


def _less(a: float, b: float) -> bool:
    return bool(np.float32(a) < np.float32(b))


def read_split(root: Path, split: str) -> tuple[str, Path, list[str]]:
    """Return year (or ""), VOC folder and the image names of one split."""
    year, _, name = split.rpartition(":")
    elsewhere = name.endswith(".txt")
    if not (elsewhere or is_plain(name)) or (year and not is_plain(year)):
        raise UserError("must be 'year:split' or 'split'")
    folder = _find_folder(root, year)
    path = Path(name) if elsewhere else folder / "ImageSets" / "Main" / f"{name}.txt"
    if not os.path.isfile(path):
        there = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise UserError(f"{path.name} must be in {path.parent}, got no such file{closest(name, there)}")
    try:
        lines = read_text(path, MAX_SPLIT).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} must be UTF-8 text, got {reason(error)}") from error
    names = [_listed_name(number, line) for number, line in enumerate(lines, start=1)]
    listed = [name for name in names if name]
    if not listed:
        raise UserError(f"{path.name} must list at least one image, got none")
    return year, folder, listed


def _find_folder(root: Path, year: str) -> Path:
    """Return the VOC folder of a year, or `root` itself for a split without one."""
    candidates = [root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}"] if year else [root]
    needed = ("ImageSets/Main", "Annotations", "JPEGImages")
    folder = next((folder for folder in candidates if folder.is_dir()), None)
    if folder is None:
        hint = "; a split of one VOC folder has no year" if (root / needed[0]).is_dir() else ""
        raise UserError(f"folder {candidates[0]} does not exist{hint}")
    for name in needed:
        if not (folder / name).is_dir():
            hint = "" if year else "; a split of a devkit is written 'year:split', such as '2012:train'"
            raise UserError(f"folder {folder} must have {', '.join(needed)}, got no {name}{hint}")
    return folder


def _listed_name(number: int, line: str) -> str:
    """Return the image name in a line of a split file; "" for an empty line and one with the flag -1."""
    words = line.split()
    flag = words[1] if len(words) == 2 else "1"
    if len(words) > 2 or flag not in ("-1", "0", "1"):
        raise UserError(f"line {number} must be an image name, or one and -1, 0 or 1, got {short(line)}")
    if not words or flag == "-1":
        return ""
    if not is_plain(words[0]):
        raise UserError(f"line {number} must name a file without a folder, got {short(words[0])}")
    return words[0]


def is_plain(name: str) -> bool:
    """Tell whether a file of this name stays inside its folder."""
    return bool(name) and "/" not in name and "\\" not in name and ".." not in name and "\0" not in name


def _image_files(folder: Path) -> dict[str, str]:
    """Return name -> file name of the images, from one directory listing."""
    files = sorted(os.listdir(folder / "JPEGImages"), reverse=True)  # of a name's files .jpeg wins, then .jpg
    parts = map(os.path.splitext, files)
    return {stem: stem + suffix for stem, suffix in parts if suffix.lower() in _SUFFIXES}


def _short(root: Path, folder: Path) -> str:
    return "" if folder == root else f"{folder.relative_to(root).as_posix()}/"


def _read_annotation(
    path: str, where: str, image_id: str, image: str, labels: Mapping[str, int], other_classes: OtherClasses
) -> tuple[ImageRecord | None, list[Problem]]:
    """Return the record of one annotation file and its problems.

    Objects with a problem are left out; of a file that has no size nothing remains.
    """
    objects: list[tuple[Box, int, bool]] = []
    problems: list[Problem] = []
    try:
        tree = parse_xml(path)
        width, height = _size(tree)
    except UserError as error:
        return None, [problem(where, error, image)]
    for number, element in enumerate(tree.findall("object"), start=1):
        try:
            name = _text(element, "name")
            if name in labels:
                objects.append((_box(element, width, height), labels[name], _difficult(element)))
            elif other_classes == "error":
                raise unknown_class(name, labels, _box_if_right(element, width, height))
        except UserError as error:
            problems.append(problem(f"{where}: object {number}", error, image))
    return record_of(image_id, image, width, height, objects), problems


def record_of(
    image_id: str, path: str, width: int, height: int, objects: Sequence[tuple[Box, int, bool]]
) -> ImageRecord:
    """Return a record of some objects, each with its box, label and whether it is difficult."""
    boxes = np.array([box for box, _, _ in objects], dtype=np.float32).reshape(-1, 4)
    labels = np.array([label for _, label, _ in objects], dtype=np.int64)
    difficult = np.array([flag for _, _, flag in objects], dtype=bool)
    return ImageRecord(image_id, path, width, height, boxes, labels, difficult)


def parse_xml(path: str | os.PathLike[str]) -> Element:
    """Parse a file of at most 4 MiB; entities are refused before they expand, nothing is fetched.

    Raises:
        UserError: there is no such file, or it is no such XML.
    """
    try:
        return defusedxml.ElementTree.fromstring(read_bytes(path, MAX_XML))
    except FileNotFoundError as error:
        raise Broken("no annotation", "file does not exist") from error
    except (OSError, ParseError, ValueError, LookupError) as error:  # defusedxml's refusals are ValueErrors
        raise UserError(f"must be plain XML, got {reason(error)}") from error


def _text(element: Element, tag: str) -> str:
    text = element.findtext(tag, default="").strip()
    if not text:
        raise UserError(f"must have a <{tag}>, got none")
    return text


def _size(tree: Element) -> tuple[int, int]:
    size = tree.find("size")
    if size is None:
        raise UserError("must have a <size>, got none")
    texts = _text(size, "width"), _text(size, "height")
    if not all(text.isdecimal() and len(text) < 10 and int(text) > 0 for text in texts):
        width, height = (one_line(text, 60) for text in texts)
        raise UserError(f"<size> must be positive integers, got width={width} height={height}")
    width, height = map(int, texts)
    check_pixels("<size>", width, height)
    return width, height


def _box(element: Element, width: int, height: int) -> Box:
    """Return half-open 0-based `(x1, y1, x2, y2)` of an object's closed 1-based corners."""
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise UserError("must have a <bndbox>, got none")
    texts = {tag: _text(bndbox, tag) for tag in _CORNERS}
    xmin, ymin, xmax, ymax = (number(tag, text) for tag, text in texts.items())
    got = {tag: f"{tag}={one_line(text, 60)}" for tag, text in texts.items()}
    annotated = (xmin - 1, ymin - 1, xmax, ymax)
    for low, high, swapped in (("xmin", "xmax", xmax < xmin), ("ymin", "ymax", ymax < ymin)):
        if swapped:
            raise Broken("box", f"{high} must not be less than {low}, got {got[low]} {got[high]}", annotated)
    box = clip_box(annotated, width, height)
    if box is None:
        rule = f"box must lie inside the image of {width}x{height}, got {' '.join(got.values())}"
        raise Broken("box", rule, annotated)
    return box


def _box_if_right(element: Element, width: int, height: int) -> Box | None:
    try:
        return _box(element, width, height)
    except UserError:
        return None


def number(tag: str, text: str) -> float:
    """Return the finite number that a text is. Raises UserError for another text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{tag} must be a number, got {short(text)}")
    return value


def _difficult(element: Element) -> bool:
    text = element.findtext("difficult", default="0").strip()
    if text not in ("0", "1"):
        raise UserError(f"<difficult> must be 0 or 1, got {short(text)}")
    return text == "1"
