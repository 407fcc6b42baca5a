"""What every data set becomes: a list of classes and one record an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageRecord:
    """One image and its objects, not yet decoded.

    Boxes are `(x1, y1, x2, y2)`, half-open, 0-based pixels of the image file
    (VOC's xmin - 1, ymin - 1, xmax, ymax).
    """

    id: str
    """Unique in its data set."""
    path: str
    width: int
    height: int
    boxes: np.ndarray
    """float32 `[N, 4]`"""
    labels: np.ndarray
    """int64 `[N]`, 1 is the first class"""
    difficult: np.ndarray
    """bool `[N]`: VOC's difficult, COCO's iscrowd; neither found nor missed counts in an evaluation"""


@dataclass(frozen=True)
class DetectionData:
    """A data set for detection: its classes (label k is `classes[k - 1]`) and its images."""

    classes: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    train_on_difficult: bool = True
    """VOC's difficult objects are trained on; COCO's crowd regions are not."""
