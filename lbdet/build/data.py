"""From a config to its data set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lbdet.classes import CLASS_LISTS
from lbdet.config import Config, DataConfig
from lbdet.data import DATASETS, LABELLED_DATASETS
from lbdet.data.augment import build_augmentation
from lbdet.data.classification import CIFAR, read_cifar
from lbdet.data.coco import read_coco
from lbdet.data.files import check_root, prepared_by, read_text, reason
from lbdet.data.labelled import LabelledData, LabelledTrainSet
from lbdet.data.loader import TrainSet
from lbdet.data.records import DetectionData
from lbdet.data.shapes import SHAPE_CLASSES, render_shapes
from lbdet.data.voc import download_voc, read_voc
from lbdet.errors import UserError, closest, short

_MAX_CLASSES = 1 << 20  # bytes of a file of class names; 22 thousand of ImageNet take 400 KiB
_MAX_NAME = 200  # characters of one of them


def read_data(config: DataConfig, splits: Sequence[str]) -> DetectionData | LabelledData:
    """Read some splits of a config's data set.

    Raises:
        UserError: an unknown data set, or whatever is wrong with its files.
    """
    if config.name in LABELLED_DATASETS:
        return _read_labelled(config, splits)
    if config.name not in DATASETS:
        names = [*DATASETS, *LABELLED_DATASETS]
        raise UserError(
            f"data.name: must be one of {', '.join(names)}, got {config.name!r}{closest(config.name, names)}"
        )
    if config.classes is None:
        raise UserError(f"data.classes: must be given for {config.name!r}, got null; voc20, coco80 or a list")
    classes = named_classes(config.classes, "data.classes")
    for name in config.score_classes or ():
        if name not in classes:
            raise UserError(
                f"data.score_classes: {name!r} is none of the {len(classes)} classes{closest(name, classes)}"
            )
    if config.name == "coco":
        if len(splits) != 1 or ":" not in splits[0]:
            raise UserError(f"data: a coco split is one images_folder:annotations.json, got {list(splits)}")
        check_root(config.root)
        images, annotations = splits[0].split(":", 1)
        return read_coco(
            Path(config.root, images), Path(config.root, annotations), classes, config.other_classes
        )
    if config.name == "shapes":
        render_shapes(config.root)
    check_root(config.root)
    return read_voc(config.root, splits, classes, config.other_classes)


def _read_labelled(config: DataConfig, splits: Sequence[str]) -> LabelledData:
    if len(splits) != 1:
        raise UserError(f"data: {config.name!r} reads one split at a time, got {list(splits)}; name one")
    if config.score_classes is not None:
        raise UserError(f"data.score_classes: is for detection, got it with {config.name!r}; leave it out")
    check_root(config.root)
    classes = named_classes(config.classes, "data.classes") if config.classes else None
    data = LABELLED_DATASETS[config.name](config.root, splits[0], classes)
    if classes not in (None, data.classes):
        raise UserError(
            f"data.classes: must be those of the data set or null, got {config.classes!r:.40} for "
            f"{', '.join(data.classes):.40}"
        )
    return data


def build_train_set(config: Config) -> TrainSet | LabelledTrainSet:
    """Read the training split and its augmentation.

    Raises:
        UserError: as `read_data`; no image; an unusable augmentation.
    """
    data = read_data(config.data, config.data.train)
    if not len(data):
        raise UserError(f"data.train: must hold images, got none in {config.data.train}")
    if isinstance(data, LabelledData):
        size = config.model.image_size
        augmentation = build_augmentation(config.data.augment, *(() if size is None else (size,)))
        return LabelledTrainSet(data, augmentation, config.seed)
    return TrainSet(data, build_augmentation(config.data.augment), config.seed)


def download(config: DataConfig) -> None:
    """Fetch a data set into `data.root`, MD5 checked: CIFAR, or the years of PASCAL VOC that the splits name.

    Raises:
        UserError: another data set, one that is made of a fetched one (its splits have the same names but not
            the same images), VOC's splits without a year, or a failing network.
    """
    if tool := prepared_by(config.root):
        raise UserError(
            f"--download: is for official data sets, got data.root {config.root}; make it with {tool}"
        )
    if config.name in CIFAR:
        read_cifar(config.root, config.name, "train", download=True)
        return
    years = {split.partition(":")[0] for split in (*config.train, *config.val) if ":" in split}
    if config.name != "voc" or not years:
        raise UserError(
            f"--download: is for CIFAR and PASCAL VOC's year:split, got data {config.name!r}, {config.train}"
        )
    for year in sorted(years):
        download_voc(config.root, year)


def named_classes(value: str | Sequence[str], where: str) -> tuple[str, ...]:
    """Return the classes that a config names: a list, a list's name, or a file with one a line.

    Raises:
        UserError: neither, or a class that stands twice, or none.
    """
    lists = CLASS_LISTS | {"shapes": SHAPE_CLASSES}
    if not isinstance(value, str):
        names = tuple(value)
    elif value in lists:
        names = lists[value]
    elif os.path.isfile(value):  # Path's raises where the text is too long for a name
        names = _lines(value)
    else:
        raise UserError(
            f"{where}: must be a list, a file or one of {', '.join(lists)}, "
            f"got {short(value)}{closest(value, lists)}"
        )
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None or not names:
        got = f"{short(twice)} twice" if names else "none"
        raise UserError(f"{where}: must be different names, at least one, got {got}")
    return names


def _lines(path: str) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank."""
    try:
        lines = [line.strip() for line in read_text(path, _MAX_CLASSES).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: must be a text file with a class name a line, got {reason(error)}"
        ) from None
    for number, line in enumerate(lines, 1):
        if len(line) > _MAX_NAME:
            raise UserError(
                f"{path}: line {number}: must be a class name of at most {_MAX_NAME} characters, "
                f"got {len(line)}"
            )
    return tuple(filter(None, lines))
