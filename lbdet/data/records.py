"""What every data set becomes: a list of classes and one record an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

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

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: Sequence[int]) -> DetectionData:
        """Return the data set with these images alone, in this order."""
        return replace(self, records=tuple(self.records[i] for i in indices))


class _Takable(Protocol):
    def __len__(self) -> int: ...
    def take(self: DataT, indices: Sequence[int]) -> DataT: ...


DataT = TypeVar("DataT", bound=_Takable)


def spread_images(data: DataT, count: int | None) -> DataT:
    """Return `count` images at equal distances in the data set's order; None, or too many, gives all.

    Not the first ones: some data sets are sorted by class.
    """
    n = len(data)
    if count is None or count >= n:
        return data
    return data.take(np.linspace(0, n - 1, count).round().astype(int).tolist())
