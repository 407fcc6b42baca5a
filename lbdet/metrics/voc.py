"""What is the average precision by PASCAL VOC's rules: 11-point (2007) or area under the curve (2010 on)?

The detections of all classes are matched together, in vectorised blocks; a class is a slice of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lbdet.metrics.boxes import BoxTable, Sample, box_iou, stack_pair

Metric = Literal["voc07", "area"]

_PAIRS = 1 << 16  # of a detection with an object, compared at once: temporaries that stay in a core's cache


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class over all images, best score first, less those of difficult objects."""

    true_positive: np.ndarray
    """bool `[N]`: found an object that no better detection had found; all others are false positives"""
    num_objects: int
    """how many objects are to be found, difficult ones not counted"""


def voc_ap(
    detections: Sequence[Sample],
    ground_truth: Sequence[Sample],
    num_classes: int,
    metric: Metric = "voc07",
    iou: float = 0.5,
) -> np.ndarray:
    """Compute the average precision of each class.

    For both metrics of the same detections call `match` once and `average_precision` on its result.

    Args:
        detections: an image each, `{"boxes": [N, 4], "labels": [N], "scores": [N]}`; arrays or CPU tensors.
        ground_truth: the same images, `{"boxes": [N, 4], "labels": [N], "difficult": [N]}`.
        num_classes: labels lie in 1..num_classes.
        metric: `voc07` (mean of 11 precisions) or `area` (under the monotone curve).
        iou: least overlap of a detection with its object, in (0, 1].

    Returns:
        float64 `[num_classes]` in [0, 1], new; entry c - 1 is class c; nan where there is no object to find.

    Raises:
        ValueError: images, shapes or labels that do not fit; an unknown metric; iou out of range.

    Reference:
        Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010; devkit, VOCevaldet.m.
    """
    if metric not in ("voc07", "area"):
        raise ValueError(f"metric: must be 'voc07' or 'area', got {metric!r}")
    return np.array([average_precision(c, metric) for c in match(detections, ground_truth, num_classes, iou)])


def match(
    detections: Sequence[Sample], ground_truth: Sequence[Sample], num_classes: int, iou: float = 0.5
) -> tuple[ClassMatches, ...]:
    """Decide for each detection whether it is a true positive, a false positive or ignored.

    A detection belongs to the object of its class and image that it overlaps most (the first of equals), also
    when a better detection has that object already: there is no second choice. Where the overlap reaches
    `iou` it is ignored if the object is difficult, true if it is the object's best-scored one, else false.
    Equal scores keep the order of the input.

    Args:
        detections, ground_truth, num_classes, iou: as for `voc_ap`.

    Returns:
        One `ClassMatches` a class; entry c - 1 is class c.

    Raises:
        ValueError: images, shapes or labels that do not fit; iou out of range.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou: must lie in (0, 1], got {iou}")
    found, objects = stack_pair(detections, ground_truth, num_classes)
    order = np.lexsort((-found.extra, found.labels))  # class by class, best score first; stable
    hit, labels = _best_object(found, objects, iou)[order], found.labels[order]
    matched = np.flatnonzero(hit >= 0)
    true_positive = np.zeros(len(hit), dtype=bool)
    true_positive[matched[np.unique(hit[matched], return_index=True)[1]]] = True

    difficult = objects.extra != 0
    counted = ~np.append(difficult, False)[hit]  # hit = -1, no object, selects the appended False
    num_objects = np.bincount(objects.labels[~difficult], minlength=num_classes + 1)
    ends = np.searchsorted(labels[counted], np.arange(num_classes + 1), side="right")
    true_positive = true_positive[counted]
    return tuple(
        ClassMatches(true_positive[ends[c - 1] : ends[c]], int(num_objects[c]))
        for c in range(1, num_classes + 1)
    )


def _best_object(found: BoxTable, objects: BoxTable, iou: float) -> np.ndarray:
    """Return each detection's object, int64 `[N]` rows of `objects`; -1 where the overlap is below `iou`."""
    stride = 1 + max(found.labels.max(initial=0), objects.labels.max(initial=0))
    wanted, keys = found.image * stride + found.labels, objects.image * stride + objects.labels
    by_key = np.argsort(keys, kind="stable")
    start = np.searchsorted(keys[by_key], wanted, side="left")
    count = np.searchsorted(keys[by_key], wanted, side="right") - start

    result = np.full(len(wanted), -1, dtype=np.int64)
    block = np.cumsum(count) // _PAIRS
    for rows in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(block)) + 1):
        # All pairs of a detection with an object of its image and class.
        detection = np.repeat(rows, count[rows])
        within = np.arange(len(detection)) - np.repeat(np.cumsum(count[rows]) - count[rows], count[rows])
        candidate = by_key[np.repeat(start[rows], count[rows]) + within]
        overlap = box_iou(found.boxes[detection], objects.boxes[candidate])
        enough = overlap >= iou
        detection, candidate, overlap = detection[enough], candidate[enough], overlap[enough]

        best_first = np.lexsort((-overlap, detection))  # stable; `detection` is sorted and stays as it is
        detection, first = np.unique(detection, return_index=True)
        result[detection] = candidate[best_first[first]]
    return result


def precision_recall(matches: ClassMatches) -> tuple[np.ndarray, np.ndarray]:
    """Return precision and recall, float64 `[N]` each, after every detection from the best score on.

    Recall is nan where there is no object to find.
    """
    found = np.cumsum(matches.true_positive)
    precision = found / np.arange(1, len(found) + 1)
    return precision, found / (matches.num_objects or np.nan)


def average_precision(matches: ClassMatches, metric: Metric) -> float:
    """Compute one class' average precision, in [0, 1]; nan where there is no object to find.

    `voc07` is the mean over t = 0, .1, ..., 1 of the best precision at recall t or more, 0 where recall stays
    below t; `area` sums that best precision over the objects found, each a recall step of 1 / num_objects.

    The thresholds are floats, t = .1 * k, as in the tools whose numbers are published; 3 / 10 < .1 * 3.
    """
    if matches.num_objects == 0:
        return float("nan")
    precision, recall = precision_recall(matches)
    best_precision = np.maximum.accumulate(precision[::-1])[::-1]
    if metric == "area":
        return float(best_precision[matches.true_positive].sum() / matches.num_objects)
    at = np.searchsorted(recall, np.arange(11) * 0.1, side="left")
    return float(np.append(best_precision, 0.0)[at].sum() / 11)
