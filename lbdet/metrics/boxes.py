"""Boxes of many images in one table, and how much two boxes overlap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

Sample = Mapping[str, ArrayLike]
"""One image: `boxes` `[N, 4]`, `labels` `[N]` and `scores` or `difficult` (ground truth) `[N]`."""


@dataclass(frozen=True)
class BoxTable:
    """The boxes of a list of images, one row a box, in the order of the list."""

    image: np.ndarray
    """int64 `[N]`: position of the image in the list"""
    boxes: np.ndarray
    """float64 `[N, 4]`"""
    labels: np.ndarray
    """int64 `[N]`, from 1"""
    extra: np.ndarray
    """float64 `[N]`: the score of a detection; 1 for a difficult object, else 0"""

    def by_class(self, num_classes: int) -> Iterator[BoxTable]:
        """Yield a table for each class, the first first; a class' boxes keep their order."""
        order = np.argsort(self.labels, kind="stable")
        ends = np.searchsorted(self.labels[order], np.arange(num_classes + 1), side="right")
        for start, end in pairwise(ends):
            rows = order[start:end]
            yield BoxTable(self.image[rows], self.boxes[rows], self.labels[rows], self.extra[rows])


def stack(samples: Sequence[Sample], extra: str, num_classes: int, where: str) -> BoxTable:
    """Put the boxes of all images into one table, checked.

    Args:
        samples: one mapping an image; numpy arrays or CPU tensors.
        extra: name of the third entry, `scores` or `difficult`.
        num_classes: labels lie in 1..num_classes.
        where: what the caller calls `samples`, for messages.

    Raises:
        ValueError: a shape that does not fit, a box or score that is not finite, a label out of range.
    """
    parts = [tuple(np.asarray(sample[key]) for key in ("boxes", "labels", extra)) for sample in samples]
    for i, (boxes, labels, values) in enumerate(parts):
        n = len(labels)
        if (boxes.shape, labels.shape, values.shape) != ((n, 4), (n,), (n,)):
            shapes = f"{boxes.shape}, {labels.shape} and {values.shape}"
            raise ValueError(
                f"{where}[{i}]: boxes, labels and {extra} must be [N, 4], [N] and [N], got {shapes}"
            )
    image = np.repeat(
        np.arange(len(parts)), np.array([len(labels) for _, labels, _ in parts], dtype=np.int64)
    )
    boxes = np.concatenate([np.zeros((0, 4)), *(part[0] for part in parts)])
    labels = np.concatenate([np.zeros(0, np.int64), *(part[1] for part in parts)]).astype(np.int64)
    values = np.concatenate([np.zeros(0), *(part[2] for part in parts)])
    _refuse(where, image, ~np.isfinite(boxes.sum(axis=1)), "boxes must be finite", boxes)
    _refuse(where, image, ~np.isfinite(values), f"{extra} must be finite", values)
    _refuse(
        where, image, (labels < 1) | (labels > num_classes), f"labels must lie in 1..{num_classes}", labels
    )
    return BoxTable(image, boxes, labels, values)


def stack_pair(
    detections: Sequence[Sample], ground_truth: Sequence[Sample], num_classes: int
) -> tuple[BoxTable, BoxTable]:
    """Return the tables of detections and of objects; a ValueError unless they are of equally many images."""
    if len(detections) != len(ground_truth):
        counts = f"{len(detections)} for {len(ground_truth)} images"
        raise ValueError(f"detections: must have an entry an image, got {counts}")
    found = stack(detections, "scores", num_classes, "detections")
    return found, stack(ground_truth, "difficult", num_classes, "ground_truth")


def _refuse(where: str, image: np.ndarray, bad: np.ndarray, rule: str, values: np.ndarray) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{where}[{image[row]}]: {rule}, got {values[row].tolist()}")


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union, broadcast: `box_iou(a[:, None], b[None])` is the matrix of all pairs.

    Boxes are half-open, so an area is (x2 - x1)(y2 - y1): the devkit's, which has + 1 on inclusive pixels.

    Args:
        a: `[..., 4]` boxes.
        b: `[..., 4]` boxes whose leading axes broadcast with a's.

    Returns:
        float64 `[...]` in [0, 1], new; 0 where a box is empty or turned inside out.
    """
    a, b = (np.moveaxis(np.asarray(boxes, np.float64), -1, 0) for boxes in (a, b))
    intersection = _area(*map(np.maximum, a[:2], b[:2]), *map(np.minimum, a[2:], b[2:]))
    union = _area(*a) + _area(*b) - intersection
    return intersection / np.where(intersection > 0, union, 1.0)


def _area(x1: np.ndarray, y1: np.ndarray, x2: np.ndarray, y2: np.ndarray) -> np.ndarray:
    return np.maximum(x2 - x1, 0) * np.maximum(y2 - y1, 0)
