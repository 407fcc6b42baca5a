"""Is a data set fit to train on? What readers refuse, what only a look at the pixels tells, and what is odd.

    error      the loader refuses it      annotation, box, class, no annotation, no image, listed twice, image
    warning    it loads, but look at it   same box, small box, no objects, same picture, no example

Parsing is the readers' own, so that check and training agree.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lbdet.data.coco import MAX_COCO, well_formed
from lbdet.data.files import open_regular, read_json
from lbdet.data.labelled import ImageFiles, LabelledData
from lbdet.data.loader import EvalSet
from lbdet.data.problems import Problem, Scan
from lbdet.data.records import DetectionData, ImageRecord
from lbdet.data.voc import parse_xml, read_split
from lbdet.errors import UserError

WARNINGS = ("same box", "small box", "no objects", "same picture", "no example")
"""kinds of problems that do not keep a data set from being loaded"""
SMALL = 2.0
"""pixels of a box's shorter side at the detector's input, below which a box is reported"""


@dataclass(frozen=True)
class ClassCount:
    """How often a class occurs."""

    name: str
    objects: int
    images: int
    difficult: int


@dataclass(frozen=True)
class Check:
    """What was found in some splits of a data set."""

    data: DetectionData | LabelledData
    problems: tuple[Problem, ...]
    """errors first"""
    classes: tuple[ClassCount, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that keep the data from being loaded."""
        return tuple(found for found in self.problems if found.kind not in WARNINGS)


def check_detection(scan: Scan[DetectionData], root: str | os.PathLike[str], input_size: int) -> Check:
    """Decode every image as the loader does, and look at every object.

    Args:
        scan: from `scan_voc` or `scan_coco`.
        root: what places are told relative to.
        input_size: side of the square that a detector scales images to, in pixels.
    """
    data, images = scan.data, EvalSet(scan.data)
    problems, digests = list(scan.problems), {}
    with_errors = {found.image for found in scan.problems}
    for index, record in enumerate(data.records):
        where = _relative(record.path, root)
        problems += _unreadable(where, record.path, lambda index=index: images[index])
        problems += _same_picture(where, record.path, digests)
        problems += _odd_objects(where, record, data.classes, input_size)
        if not len(record.labels) and record.path not in with_errors:
            problems.append(Problem(where, "has no objects", "no objects", record.path))
    counts = _class_counts(data)
    return Check(data, _sorted(problems + _without_example(counts)), counts)


def check_labelled(scan: Scan[LabelledData], root: str | os.PathLike[str]) -> Check:
    """Decode every image as the loader does, and count the classes."""
    data, digests = scan.data, {}
    paths = data.images.paths if isinstance(data.images, ImageFiles) else ()
    problems, refused = list(scan.problems), {found.image for found in scan.problems if found.image}
    for index in range(len(data)):
        path = paths[index] if paths else ""
        if path in refused:
            continue
        where = _relative(path, root) if path else f"image {index}"
        problems += _unreadable(where, path, lambda index=index: data.image(index))
        problems += _same_picture(where, path, digests) if path else []
    numbers = np.bincount(data.labels, minlength=len(data.classes)).tolist()
    counts = tuple(ClassCount(name, n, n, 0) for name, n in zip(data.classes, numbers, strict=True))
    return Check(data, _sorted(problems + _without_example(counts)), counts)


def found_classes(root: str | os.PathLike[str], splits: Sequence[str]) -> tuple[str, ...]:
    """Return the sorted names of the classes that occur in some splits of a VOC folder or devkit.

    Annotations that cannot be read are passed over.

    Raises:
        UserError: a split that cannot be read.
    """
    names: set[str] = set()
    for split in splits:
        _, folder, listed = read_split(Path(root), split)
        for name in listed:
            names.update(_class_names(folder / "Annotations" / f"{name}.xml"))
    return tuple(sorted(names))


def clean_lists(check: Check) -> dict[str, list[str]]:
    """Return the names of the images without an error by VOC folder, as the list of a split has them."""
    lists: dict[str, list[str]] = defaultdict(list)
    for record in _clean(check):
        folder = Path(record.path).parent.parent
        lists[str(folder)].append(Path(record.path).stem)
    return dict(lists)


def clean_coco(check: Check, annotations: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a COCO file without the images that have an error, and without their objects.

    An image goes as a whole: without an object that has an error it would teach that there is none.
    """
    content = read_json(annotations, MAX_COCO)
    rows, _ = well_formed(annotations, content)
    good = {id(row) for row in rows["annotations"]}
    rest = (row for row in content["annotations"] if id(row) not in good)
    bad = {str(row.get("image_id")) for row in rest if isinstance(row, dict)}
    kept = {record.id for record in _clean(check)} - bad
    return {
        **content,
        "images": [row for row in rows["images"] if str(row["id"]) in kept],
        "annotations": [row for row in rows["annotations"] if str(row["image_id"]) in kept],
    }


def _clean(check: Check) -> list[ImageRecord]:
    assert isinstance(check.data, DetectionData)
    bad = {found.image for found in check.errors}
    return [record for record in check.data.records if record.path not in bad]


def _sorted(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda found: found.kind in WARNINGS))


def _relative(path: str, root: str | os.PathLike[str]) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _unreadable(where: str, path: str, read: Any) -> list[Problem]:
    """Return the problem of an image that the loader refuses."""
    try:
        read()
    except UserError as error:
        return [Problem(where, str(error).removeprefix(f"{path}: "), "image", path)]
    return []


def _same_picture(where: str, path: str, digests: dict[bytes, str]) -> list[Problem]:
    """Tell of a file with the bytes of an earlier one; `digests` remembers them."""
    try:
        with open_regular(path) as file:
            digest = hashlib.sha256(file.read()).digest()
    except OSError:
        return []
    first = digests.setdefault(digest, where)
    return [] if first == where else [Problem(where, f"is the same file as {first}", "same picture", path)]


def _odd_objects(
    where: str, record: ImageRecord, classes: Sequence[str], input_size: int
) -> Iterator[Problem]:
    scale = np.array([input_size / record.width, input_size / record.height])
    seen: set[tuple[int, ...]] = set()
    for box, label in zip(record.boxes, record.labels, strict=True):
        x1, y1, x2, y2 = box.tolist()
        place = f"{where}: {classes[label - 1]} at {x1:.0f},{y1:.0f} to {x2:.0f},{y2:.0f}"
        side = float(((box[2:] - box[:2]) * scale).min())
        if side < SMALL:
            rule = f"is {side:.1f} pixels wide or high where the image is scaled to {input_size}x{input_size}"
            yield Problem(place, rule, "small box", record.path, (x1, y1, x2, y2))
        same = (int(label), *np.rint(box).astype(int).tolist())
        if same in seen:
            yield Problem(place, "stands twice in this image", "same box", record.path, (x1, y1, x2, y2))
        seen.add(same)


def _class_counts(data: DetectionData) -> tuple[ClassCount, ...]:
    objects, images, difficult = Counter[int](), Counter[int](), Counter[int]()
    for record in data.records:
        objects.update(record.labels.tolist())
        images.update(set(record.labels.tolist()))
        difficult.update(record.labels[record.difficult].tolist())
    return tuple(
        ClassCount(name, objects[label], images[label], difficult[label])
        for label, name in enumerate(data.classes, start=1)
    )


def _without_example(counts: Sequence[ClassCount]) -> list[Problem]:
    return [Problem(f"class {c.name}", "has no example", "no example") for c in counts if not c.objects]


def _class_names(path: Path) -> set[str]:
    try:
        objects = parse_xml(path).findall("object")
    except UserError:
        return set()
    return {name for element in objects if (name := element.findtext("name", default="").strip())}


def in_both(checks: Mapping[str, Check]) -> list[Problem]:
    """Tell of images that several groups of splits have, by the file."""
    seen: dict[str, str] = {}
    problems = []
    for group, check in checks.items():
        assert isinstance(check.data, DetectionData)
        for record in check.data.records:
            first = seen.setdefault(os.path.realpath(record.path), group)
            if first != group:
                problems.append(
                    Problem(record.path, f"is in {first} and in {group}", "same picture", record.path)
                )
    return problems
