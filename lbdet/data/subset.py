"""A smaller PASCAL VOC: fewer images with a shorter side, for experiments in minutes instead of days."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree

from PIL import Image

from lbdet.data.images import read_image
from lbdet.data.voc import is_plain, number, parse_xml
from lbdet.errors import UserError, short

SHORT_SIDE, JPEG_QUALITY = 300, 85


def make_subset(
    voc: str | os.PathLike[str], splits: Mapping[str, Sequence[str]], output: str | os.PathLike[str]
) -> int:
    """Copy listed images of a VOC folder, reduced to a short side of at most 300 pixels, with their boxes.

    The folder appears whole or not at all.

    Args:
        voc: the official folder (JPEGImages, Annotations).
        splits: split name -> image ids.
        output: a new devkit; `VOCdevkit/VOC2012` is made in it.

    Returns:
        The number of images.

    Raises:
        UserError: `output` exists, an id leads out of the folders, or an image or annotation is missing or
            damaged.
    """
    source, target = Path(voc), Path(output)
    if target.exists():
        raise UserError(f"{output}: must not exist yet; remove it or name another folder")
    for name in chain(splits, *splits.values()):
        if not is_plain(name):
            raise UserError(f"{output}: ids must be names of files without a folder, got {short(name)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        year = Path(scratch, "devkit", "VOCdevkit", "VOC2012")
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (year / folder).mkdir(parents=True)
        for split, ids in splits.items():
            for name in ids:
                _reduce(source, year, name)
            (year / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
        Path(scratch, "devkit").rename(target)
    return sum(map(len, splits.values()))


def _reduce(source: Path, year: Path, name: str) -> None:
    image = Image.fromarray(read_image(source / "JPEGImages" / f"{name}.jpg"))
    scale = min(1.0, SHORT_SIDE / min(image.size))
    width, height = (max(1, round(scale * side)) for side in image.size)
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        year / "JPEGImages" / f"{name}.jpg", quality=JPEG_QUALITY
    )
    path = source / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree(parse_xml(path))
        _scale(tree, scale, width, height)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tree.write(year / "Annotations" / f"{name}.xml", encoding="unicode")


def _scale(tree: ElementTree, scale: float, width: int, height: int) -> None:
    """Scale all boxes, VOC's 1-based inclusive pixels, rounding to the pixel that an edge falls into."""
    for tag, value in (("size/width", width), ("size/height", height)):
        _find(tree, tag).text = str(value)
    for item in tree.iterfind("object"):
        for part in item.findall("part"):
            item.remove(part)
        box = _find(item, "bndbox")
        for tag, offset, side in (
            ("xmin", 1, width),
            ("ymin", 1, height),
            ("xmax", 0, width),
            ("ymax", 0, height),
        ):
            corner = _find(box, tag)
            pixel = math.floor((number(tag, corner.text or "") - offset) * scale) + offset
            corner.text = str(min(max(pixel, 1), side))


def _find(tree: Element | ElementTree, tag: str) -> Element:
    found = tree.find(tag)
    if found is None:
        raise UserError(f"must have a <{tag}>, got none; unpack the official archive again")
    return found
