"""How good is a detector on a data set? Detections of all images, then VOC's and COCO's averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbdet.convert import hold_weights
from lbdet.data.loader import EvalSet, eval_batches
from lbdet.data.records import DetectionData
from lbdet.engine import distributed
from lbdet.engine.progress import track
from lbdet.metrics.coco import coco_ap
from lbdet.metrics.voc import average_precision, match

Detections = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of metrics.json, and the detections that they were computed from."""

    metrics: dict[str, Any]
    detections: Detections


def to_model(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move uint8 images `[3, H, W]` to the device and scale them to float32 in [0, 1]."""
    return [image.to(device, non_blocking=True).float().div_(255) for image in images]


def image_batches(
    data: DetectionData, batch_size: int, workers: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """Yield a data set's images in order, ready for the model."""
    for images, _ in eval_batches(EvalSet(data), batch_size, workers):
        yield to_model(images, device)


@torch.no_grad()
def detect(model: nn.Module, data: DetectionData, batch_size: int, workers: int = 1) -> Detections:
    """Run the detector on every image, in order.

    Returns:
        An image each, `{"boxes": float32 [N, 4], "labels": int64 [N], "scores": float32 [N]}`, numpy,
        in pixels of the image file.
    """
    model.eval()
    device = next(model.parameters()).device
    batches = -(-len(data.records) // batch_size)
    detections: Detections = []
    with hold_weights(model):
        for images in track(image_batches(data, batch_size, workers, device), batches, "evaluate"):
            detections += [{k: v.cpu().numpy() for k, v in found.items()} for found in model(images)]
    return detections


def evaluate(
    model: nn.Module,
    data: DetectionData,
    score_classes: Sequence[str] | None = None,
    batch_size: int = 8,
    workers: int = 1,
) -> Evaluation:
    """Measure a detector; several processes share the batches, and each returns the whole.

    Args:
        score_classes: the classes that the means are over; None = all. Classes without an object
            do not count.

    Returns:
        Metrics with the keys `voc07_map` (11-point), `voc_area_map`, `per_class`, `coco` and `images`.
    """
    mine = distributed.own_batches(data, batch_size)
    detections = list(chain(*distributed.gather(detect(model, mine, batch_size, workers))))
    return Evaluation(distributed.first(partial(score, detections, data, score_classes)), detections)


def score(detections: Detections, data: DetectionData, score_classes: Sequence[str] | None) -> dict[str, Any]:
    """Compute the metrics of detections, one entry an image of `data`."""
    truth = [{"boxes": r.boxes, "labels": r.labels, "difficult": r.difficult} for r in data.records]
    matches = match(detections, truth, len(data.classes))
    coco = coco_ap(detections, truth, len(data.classes), areas=False)
    per_class = {
        name: {
            "voc07": average_precision(matches[k], "voc07"),
            "voc_area": average_precision(matches[k], "area"),
            "coco": coco["per_class"][k],
            "objects": matches[k].num_objects,
        }
        for k, name in enumerate(data.classes)
    }
    scored = [per_class[name] for name in score_classes or data.classes]
    return {
        "voc07_map": _mean([c["voc07"] for c in scored]),
        "voc_area_map": _mean([c["voc_area"] for c in scored]),
        "coco_map": _mean([c["coco"] for c in scored]),
        "scored_classes": list(score_classes or data.classes),
        "per_class": {name: _without_nan(values) for name, values in per_class.items()},
        "coco": _without_nan({key: coco[key] for key in ("ap", "ap50", "ap75")}),
        "images": len(data.records),
    }


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if not np.isnan(v)]
    return float(np.mean(finite)) if finite else None


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: a class without objects has null."""
    return {key: None if np.isnan(value) else value for key, value in values.items()}
