"""Data sets by name, for detection and for classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lbdet.data.classification import read_cifar, read_image_folder, read_npz
from lbdet.data.coco import read_coco
from lbdet.data.labelled import LabelledData
from lbdet.data.records import DetectionData
from lbdet.data.shapes import read_shapes
from lbdet.data.tiny_imagenet import read_tiny_imagenet
from lbdet.data.voc import read_voc

DATASETS: dict[str, Callable[..., DetectionData]] = {
    "voc": read_voc,
    "coco": read_coco,
    "shapes": read_shapes,
}
"""Readers of boxes; their arguments differ as the formats do."""

LABELLED_DATASETS: dict[str, Callable[[str, str, Sequence[str] | None], LabelledData]] = {
    "imagefolder": read_image_folder,
    "cifar10": lambda root, split, _: read_cifar(root, "cifar10", split),
    "cifar100": lambda root, split, _: read_cifar(root, "cifar100", split),
    "npz": lambda root, split, _: read_npz(root, split),
    "tiny_imagenet": lambda root, split, _: read_tiny_imagenet(root, split),
}
"""Readers of one label an image, from a path, a split and the classes, which only folders leave open."""
