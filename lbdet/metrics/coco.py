"""What is the average precision by COCO's rules? pycocotools' answer, from and to plain arrays."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lbdet.metrics.boxes import BoxTable, Sample, stack, stack_pair


class CocoAP(TypedDict):
    """COCO's six averages, each in [0, 1], or nan where there is nothing to find."""

    ap: float
    """mean over IoU .50, .55, ..., .95"""
    ap50: float
    ap75: float
    ap_small: float
    """objects up to 32 x 32 pixels; medium up to 96 x 96; large above"""
    ap_medium: float
    ap_large: float
    per_class: list[float]
    """`ap` of each class; entry c - 1 is class c"""


def coco_ap(
    detections: Sequence[Sample], ground_truth: Sequence[Sample], num_classes: int, areas: bool = True
) -> CocoAP:
    """Compute COCO's average precisions (at most 100 detections an image and class, 101 recall points).

    Difficult objects become crowds: a detection that lies in one is ignored. Overlap with a crowd is the
    intersection over the *detection's* area.

    Args:
        detections: an image each, `{"boxes": [N, 4], "labels": [N], "scores": [N]}`; arrays or CPU tensors.
        ground_truth: the same images, `{"boxes": [N, 4], "labels": [N], "difficult": [N]}`.
        num_classes: labels lie in 1..num_classes.
        areas: also compute `ap_small`, `ap_medium` and `ap_large`, which triples the time; else they are nan.

    Raises:
        ValueError: images, shapes or labels that do not fit.

    Reference:
        Lin et al., Microsoft COCO: Common Objects in Context, 2014, arXiv 1405.0312; pycocotools.
    """
    found, objects = stack_pair(detections, ground_truth, num_classes)
    precision = np.full((10, 101, num_classes, 4), -1.0)  # [IoU, recall, class, area]; -1: nothing to find
    sizes = slice(None if areas else 1)
    by_class = zip(found.by_class(num_classes), objects.by_class(num_classes), strict=True)
    for c, (found_of_c, objects_of_c) in enumerate(by_class):
        if len(objects_of_c.labels):
            precision[:, :, c, sizes] = _precision(found_of_c, objects_of_c, sizes)
    return CocoAP(
        ap=_mean(precision[..., 0]),
        ap50=_mean(precision[0, ..., 0]),
        ap75=_mean(precision[5, ..., 0]),
        ap_small=_mean(precision[..., 1]),
        ap_medium=_mean(precision[..., 2]),
        ap_large=_mean(precision[..., 3]),
        per_class=[_mean(precision[:, :, c, 0]) for c in range(num_classes)],
    )


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")


def _precision(found: BoxTable, objects: BoxTable, sizes: slice) -> np.ndarray:
    """Return what pycocotools computes for one class, float64 `[10, 101, sizes]`.

    It steps through every pair of an image and a class, thus one class at a time and none but its images.
    """
    images = np.union1d(found.image, objects.image).tolist()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation = COCOeval(_as_coco(objects, images), _as_coco(found, images), "bbox")
        evaluation.params.maxDets = [100]
        evaluation.params.areaRng = evaluation.params.areaRng[sizes]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, :, 0]


def _as_coco(table: BoxTable, images: Sequence[int]) -> COCO:
    """Make pycocotools' data set without files. Its ids start at 1: id 0 of a match would mean no match."""
    columns = (table.image, _xywh(table.boxes), table.extra)
    annotations = [
        {"id": i, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3]}
        | {"score": extra, "iscrowd": int(extra)}  # one is read of a detection, the other of an object
        for i, (image, box, extra) in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1)
    ]
    dataset: Any = {  # its type stub asks for keys that are never read
        "images": [{"id": i} for i in images],
        "categories": [{"id": 1}],
        "annotations": annotations,
    }
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def to_coco_results(
    detections: Sequence[Sample], image_ids: Sequence[int | str], category_ids: Sequence[int] | None = None
) -> list[dict[str, object]]:
    """Turn detections into COCO's results format, ready for `json.dump`.

    Args:
        detections: an image each, `{"boxes": [N, 4], "labels": [N], "scores": [N]}`; arrays or CPU tensors.
        image_ids: the id of each image, written as it is.
        category_ids: the id of class c at c - 1; None: the label itself.

    Returns:
        One `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}` a detection, in their order;
        boxes to 2 decimals of a pixel and scores to 5, which keeps the file small.

    Raises:
        ValueError: lengths, shapes or labels that do not fit.
    """
    if len(detections) != len(image_ids):
        raise ValueError(
            f"image_ids: must have an entry an image, got {len(image_ids)} for {len(detections)} images"
        )
    num_classes = np.iinfo(np.int64).max if category_ids is None else len(category_ids)
    table = stack(detections, "scores", num_classes, "detections")
    columns = (table.image, table.labels, _round(_xywh(table.boxes), 2), _round(table.extra, 5))
    return [
        {
            "image_id": image_ids[image],
            "category_id": label if category_ids is None else category_ids[label - 1],
            "bbox": box,
            "score": score,
        }
        for image, label, box, score in zip(*(c.tolist() for c in columns), strict=True)
    ]


def _round(values: np.ndarray, decimals: int) -> np.ndarray:
    """Round each number as Python's `round` does, which looks at all its binary digits; a new array."""
    scaled = values * 10.0**decimals
    rounded = np.rint(scaled) / 10.0**decimals
    from_half = np.abs(scaled - np.floor(scaled) - 0.5)
    unsure = ~(from_half > 2 * np.spacing(np.abs(scaled)))  # perhaps the product only, itself rounded, is one
    rounded[unsure] = [round(value, decimals) for value in values[unsure].tolist()]
    return rounded
