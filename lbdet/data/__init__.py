"""Data sets by name. Every reader returns `DetectionData`; their arguments differ as the formats do."""

from __future__ import annotations

from collections.abc import Callable

from lbdet.data.coco import read_coco
from lbdet.data.records import DetectionData
from lbdet.data.shapes import read_shapes
from lbdet.data.voc import read_voc

DATASETS: dict[str, Callable[..., DetectionData]] = {
    "voc": read_voc,
    "coco": read_coco,
    "shapes": read_shapes,
}
