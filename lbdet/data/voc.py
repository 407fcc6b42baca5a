"""Read data sets in the layout of PASCAL VOC, every annotation checked before the first batch.

A VOC folder holds `JPEGImages/`, `Annotations/` and `ImageSets/Main/`; a devkit holds one such folder a year.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
import numpy as np
import torchvision

from lbdet.data.records import DetectionData, ImageRecord
from lbdet.errors import UserError, closest

OtherClasses = Literal["error", "ignore"]
Problem = tuple[str, str]
"""Where in the data set, and the rule that is broken there."""

_SUFFIXES = (".jpg", ".jpeg", ".png")
_SHOWN = 10  # problems listed in one message
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
        splits: `year:split`, such as `2007:trainval`, for a devkit; bare `split` for one VOC folder.
        classes: label k is `classes[k - 1]`.
        other_classes: whether an object of another class is an error or is left out.

    Raises:
        UserError: with all problems of all files (the first ten spelled out).
    """
    root = Path(root)
    labels = label_map(classes)
    several_years = len({split.partition(":")[0] for split in splits if ":" in split}) > 1
    records: dict[str, ImageRecord] = {}
    problems: list[Problem] = []
    for split in splits:
        try:
            year, folder, names = _read_split(root, split)
        except UserError as error:
            problems.append((f"split {split!r}", str(error)))
            continue
        prefix = f"{year}_" if several_years and year else ""
        images = _image_files(folder)
        for name in names:
            if prefix + name in records:
                problems.append((f"split {split!r}", f"an image must be listed once, got {name!r} twice"))
            elif name not in images:
                rule = f"must have an image {name}.jpg (or .jpeg, .png), got none"
                problems.append((f"{_short(root, folder)}JPEGImages", rule))
            else:
                path = os.path.join(folder, "Annotations", f"{name}.xml")
                where = f"{_short(root, folder)}Annotations/{name}.xml"
                image = os.path.join(folder, "JPEGImages", images[name])
                record, found = _read_annotation(path, where, prefix + name, image, labels, other_classes)
                records[record.id] = record
                problems.extend(found)
    raise_problems(root, problems)
    return DetectionData(classes=tuple(classes), records=tuple(records.values()))


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
    for name in classes:
        if list(classes).count(name) > 1:
            raise UserError(f"classes: names must differ, got {name!r} more than once")
    return {name: label for label, name in enumerate(classes, start=1)}


def unknown_class(name: str, labels: Mapping[str, int]) -> UserError:
    """Return the error for an object of a class that is not in the list."""
    return UserError(
        f"class must be one of the {len(labels)} classes, got {name!r}; "
        f"add it to classes or set other_classes: ignore{closest(name, labels)}"
    )


def clip_box(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float] | None:
    """Clip `(x1, y1, x2, y2)` to the image; None where it is more than a pixel outside or nothing remains."""
    x1, y1, x2, y2 = box
    if min(x1, y1) < -_TOLERANCE or x2 > width + _TOLERANCE or y2 > height + _TOLERANCE:
        return None
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def raise_problems(where: str | os.PathLike[str], problems: Sequence[Problem]) -> None:
    """Raise one UserError that lists the problems, if there are any; those that read the same stand once."""
    groups: dict[str, list[str]] = {}
    for place, text in problems:
        groups.setdefault(text, []).append(place)
    lines = [
        f"{places[0]}: {text}" + (f" (and {len(places) - 1} more like this)" if len(places) > 1 else "")
        for text, places in groups.items()
    ]
    if len(lines) == 1:
        raise UserError(f"{where}: {lines[0]}")
    if lines:
        more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise UserError("\n  ".join([f"{where}: {len(problems)} problems", *lines[:_SHOWN], *more]))


def _read_split(root: Path, split: str) -> tuple[str, Path, list[str]]:
    """Return year (or ""), VOC folder and the image names of one split."""
    year, _, name = split.rpartition(":")
    if not _is_plain(name) or (year and not _is_plain(year)):
        raise UserError("must be 'year:split' or 'split'")
    folder = _find_folder(root, year)
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.txt"))
        raise UserError(f"{path.name} must be in {path.parent}, got no such file{closest(name, there)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} must be UTF-8 text, got {error}") from error
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
        raise UserError(f"line {number} must be an image name, or one and -1, 0 or 1, got {line!r}")
    if not words or flag == "-1":
        return ""
    if not _is_plain(words[0]):
        raise UserError(f"line {number} must name a file without a folder, got {words[0]!r}")
    return words[0]


def _is_plain(name: str) -> bool:
    """Tell whether a name stays inside its folder."""
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
) -> tuple[ImageRecord, list[Problem]]:
    """Return the record of one annotation file, and its problems (the record is then incomplete)."""
    objects: list[tuple[tuple[float, float, float, float], int, bool]] = []
    problems: list[Problem] = []
    width = height = 0
    try:
        tree = _parse(path)
        width, height = _size(tree)
        for number, element in enumerate(tree.findall("object"), start=1):
            try:
                name = _text(element, "name")
                if name in labels:
                    objects.append((_box(element, width, height), labels[name], _difficult(element)))
                elif other_classes == "error":
                    raise unknown_class(name, labels)
            except UserError as error:
                problems.append((f"{where}: object {number}", str(error)))
    except UserError as error:
        problems.append((where, str(error)))
    boxes = np.array([box for box, _, _ in objects], dtype=np.float32).reshape(-1, 4)
    numbers = np.array([label for _, label, _ in objects], dtype=np.int64)
    difficult = np.array([flag for _, _, flag in objects], dtype=bool)
    return ImageRecord(image_id, image, width, height, boxes, numbers, difficult), problems


def _parse(path: str) -> Element:
    try:
        return defusedxml.ElementTree.fromstring(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError("file does not exist") from error
    except (OSError, ParseError, ValueError, LookupError) as error:  # defusedxml's refusals are ValueErrors
        raise UserError(f"must be plain XML, got {error}") from error


def _text(element: Element, tag: str) -> str:
    text = element.findtext(tag, default="").strip()
    if not text:
        raise UserError(f"must have a <{tag}>, got none")
    return text


def _size(tree: Element) -> tuple[int, int]:
    size = tree.find("size")
    if size is None:
        raise UserError("must have a <size>, got none")
    width, height = _text(size, "width"), _text(size, "height")
    if not (width.isdecimal() and height.isdecimal() and int(width) > 0 and int(height) > 0):
        raise UserError(f"<size> must be positive integers, got width={width} height={height}")
    return int(width), int(height)


def _box(element: Element, width: int, height: int) -> tuple[float, float, float, float]:
    """Return half-open 0-based `(x1, y1, x2, y2)` of an object's closed 1-based corners."""
    bndbox = element.find("bndbox")
    if bndbox is None:
        raise UserError("must have a <bndbox>, got none")
    texts = {tag: _text(bndbox, tag) for tag in _CORNERS}
    xmin, ymin, xmax, ymax = (_number(tag, text) for tag, text in texts.items())
    for low, high, swapped in (("xmin", "xmax", xmax < xmin), ("ymin", "ymax", ymax < ymin)):
        if swapped:
            got = f"{low}={texts[low]} {high}={texts[high]}"
            raise UserError(f"{high} must not be less than {low}, got {got}")
    box = clip_box((xmin - 1, ymin - 1, xmax, ymax), width, height)
    if box is None:
        got = " ".join(f"{tag}={text}" for tag, text in texts.items())
        raise UserError(f"box must lie inside the image of {width}x{height}, got {got}")
    return box


def _number(tag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{tag} must be a number, got {text!r}")
    return number


def _difficult(element: Element) -> bool:
    text = element.findtext("difficult", default="0").strip()
    if text not in ("0", "1"):
        raise UserError(f"<difficult> must be 0 or 1, got {text!r}")
    return text == "1"
