"""Does the exported file find what the trained model finds?

On real images, of the engine against torch at the same widths:

    means       mAP (or top-1) of both on the same images; a drop of the first mean is what is judged
    detections  of scores of at least 0.3: pairs of one class that overlap, their scores and boxes; lost; new
    codes       of each layer's input: the share that differs, and by how much (see `lbdet.deploy.codes`)

All three differ a little without anything being wrong. Engines add floats in another order, so now and then
an input in the middle between two codes falls to the other side, and behind 60 layers that one step has
become many. How much that is, is measured: `noise` are the same differences between the torch model and
itself with the input of every layer larger by a millionth. It explains a drop and excuses none: it is one
draw of what is random, so taking it off a drop could hide a real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lbdet.convert import hold_weights, quantized_layers
from lbdet.data.images import read_image
from lbdet.data.labelled import LabelledData, LabelledEvalSet
from lbdet.data.records import DetectionData
from lbdet.deploy.engines import Engine
from lbdet.engine.evaluate import Detections, detect, score
from lbdet.engine.task import ClassificationTask, DetectionTask, Task
from lbdet.metrics import diff_detections
from lbdet.metrics.boxes import box_iou
from lbdet.metrics.topk import top_k

LOWEST_SCORE = 0.3
"""of the detections that are compared one by one"""


def parity(model: nn.Module, engine: Engine, task: Task, data: Any) -> dict[str, Any]:
    """Compare a model in torch with its exported file.

    Args:
        model: as it was exported, on the CPU.
        task, data: what it is for, and the images; of one kind.

    Returns:
        `images`, their number; `means` of `torch`, `engine` and `noise`, the one that is judged first; `drop`
        and `noise_drop`, what the engine and the noise lose of it against torch, in parts of 1, None where
        no image has an object of a class that is scored;
        `differences` of `engine` and `noise` from torch: see `detection_differences`; of a classifier the
        largest difference of a score.
    """
    if isinstance(task, DetectionTask):
        means, differences = _detection(model, engine, data, task.score_classes)
    else:
        assert isinstance(task, ClassificationTask)
        means, differences = _classification(model, engine, task, data)
    first = {kind: next(iter(values.values())) for kind, values in means.items()}
    return {
        "images": len(data),
        "means": means,
        "drop": _difference(first["torch"], first["engine"]),
        "noise_drop": _difference(first["torch"], first["noise"]),
        "differences": differences,
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Make the input of every quantized layer larger by a millionth inside, as float sums may be."""
    with ExitStack() as stack:
        for layer in quantized_layers(model).values():
            stack.callback(layer.register_forward_pre_hook(lambda _, x: (x[0] * (1 + 1e-6),)).remove)
        yield


def raw_images(data: DetectionData | LabelledData, image_size: int | None = None) -> Iterator[np.ndarray]:
    """Yield the images of a data set as an engine takes them, uint8 `[H, W, 3]`; of a classifier's the
    centre."""
    if isinstance(data, DetectionData):
        yield from (read_image(record.path) for record in data.records)
    else:
        items = LabelledEvalSet(data, image_size)
        for i in range(len(items)):
            yield np.ascontiguousarray(items[i][0].numpy().transpose(1, 2, 0))


def detection_differences(reference: Detections, found: Detections) -> dict[str, float | int | None]:
    """Compare detections of scores of at least `LOWEST_SCORE`, image by image.

    Returns:
        How many are `kept`, `lost` and `new`; of pairs the median and the largest difference of scores, and
        the least overlap (IoU); None where there is no pair.
    """
    kept, lost, new, scores, overlaps = 0, 0, 0, [], []
    for ours, theirs in zip(map(_confident, reference), map(_confident, found), strict=True):
        diff = diff_detections(ours, theirs)
        kept, lost, new = kept + len(diff.kept), lost + len(diff.lost), new + len(diff.new)
        i, j = diff.kept.T
        scores += np.abs(ours["scores"][i] - theirs["scores"][j]).tolist()
        overlaps += box_iou(ours["boxes"][i], theirs["boxes"][j]).tolist()
    return {
        "kept": kept,
        "lost": lost,
        "new": new,
        "median_score_difference": float(np.median(scores)) if scores else None,
        "largest_score_difference": max(scores, default=None),
        "least_overlap": min(overlaps, default=None),
    }


def _detection(
    model: nn.Module, engine: Engine, data: DetectionData, score_classes: Sequence[str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    results = {"torch": detect(model, data, batch_size=1, workers=0)}
    with nudged(model):
        results["noise"] = detect(model, data, batch_size=1, workers=0)
    results["engine"] = [engine.run(image) for image in raw_images(data)]
    means = {kind: score(found, data, score_classes) for kind, found in results.items()}
    keys = [key for _, key in DetectionTask.headline]
    return {kind: {key: found[key] for key in keys} for kind, found in means.items()}, {
        kind: detection_differences(results["torch"], results[kind]) for kind in ("engine", "noise")
    }


@torch.no_grad()
def _classification(
    model: nn.Module, engine: Engine, task: ClassificationTask, data: LabelledData
) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = partial(task.inputs, data, 8, torch.device("cpu"))
    with hold_weights(model.eval()):
        results = {"torch": torch.cat([model(batch).softmax(-1) for batch in inputs()]).numpy()}
        with nudged(model):
            results["noise"] = torch.cat([model(batch).softmax(-1) for batch in inputs()]).numpy()
    images = raw_images(data, task.image_size)
    results["engine"] = np.stack([engine.run(image)["scores"] for image in images])
    means: dict[str, Mapping[str, Any]] = {k: top_k(found, data.labels) for k, found in results.items()}
    return dict(means), {
        kind: {"largest_score_difference": float(np.abs(results[kind] - results["torch"]).max(initial=0))}
        for kind in ("engine", "noise")
    }


def _confident(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = found["scores"] >= LOWEST_SCORE
    return {key: values[kept] for key, values in found.items()}
