"""Which detections of one image does another model keep, lose or add?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lbdet.metrics.boxes import Sample, box_iou, stack


@dataclass(frozen=True)
class DetectionDiff:
    """The detections of two models on one image, paired; all indices int64, ascending."""

    kept: np.ndarray
    """`[K, 2]`: pairs (index in the reference, index in the other)"""
    lost: np.ndarray
    """`[L]`: indices in the reference that have no partner"""
    new: np.ndarray
    """`[M]`: indices in the other that have no partner"""


def diff_detections(reference: Sample, other: Sample, iou: float = 0.5) -> DetectionDiff:
    """Pair the detections of two models on one image, one to one, class by class.

    The reference's detections choose in the order of their scores (equal scores: of the input); each takes
    the free detection of its class that it overlaps most, if that is at least `iou`. Low scores take part
    too: apply the score threshold first.

    Args:
        reference: `{"boxes": [N, 4], "labels": [N], "scores": [N]}`, such as the float model's.
        other: the same for the model to compare, such as the quantized one's.
        iou: least overlap of a pair, in (0, 1].

    Raises:
        ValueError: shapes that do not fit, a box or score that is not finite, iou out of range.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou: must lie in (0, 1], got {iou}")
    any_label = np.iinfo(np.int64).max
    ours = stack([reference], "scores", any_label, "reference")
    theirs = stack([other], "scores", any_label, "other")
    overlap = box_iou(ours.boxes[:, None], theirs.boxes[None])
    overlap[ours.labels[:, None] != theirs.labels[None]] = 0.0

    partner = np.full(len(ours.boxes), -1, dtype=np.int64)
    for i in np.argsort(-ours.extra, kind="stable") if overlap.size else ():
        j = int(overlap[i].argmax())
        if overlap[i, j] >= iou:
            partner[i] = j
            overlap[:, j] = 0.0
    paired = np.flatnonzero(partner >= 0)
    return DetectionDiff(
        kept=np.stack([paired, partner[paired]], axis=1),
        lost=np.flatnonzero(partner < 0),
        new=np.setdiff1d(np.arange(len(theirs.boxes)), partner),
    )
