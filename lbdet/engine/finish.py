"""The end of a run: recalibrate, save, evaluate, and leave the files that tell the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lbdet.convert import correct_bn, coverage, coverage_json, model_bytes
from lbdet.data.records import DetectionData
from lbdet.engine.evaluate import evaluate, first_images, image_batches, spread_images
from lbdet.engine.progress import say
from lbdet.engine.run_folder import RunFolder
from lbdet.metrics.coco import to_coco_results
from lbdet.nn.batch_norm import recalibrate_bn


def finish(
    model: nn.Module,
    train_data: DetectionData,
    val: DetectionData,
    run: RunFolder,
    architecture: str,
    score_classes: Sequence[str] | None,
    max_images: int | None,
    batch_size: int,
    recalibrate_images: int,
    keep_float: Sequence[str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Evaluate a trained model and write the run's results; metrics.json, the mark of the end, comes last.

    Args:
        recalibrate_images: as for `recalibrate`, which comes first.
        facts: what else belongs into metrics.json (precision, steps, seed).

    Returns:
        The content of metrics.json.
    """
    recalibrate(model, train_data, recalibrate_images)
    run.save_model(model, architecture, val.classes)
    val = first_images(val, max_images)
    result = evaluate(model, val, score_classes, batch_size)
    run.write_json("coverage.json", coverage_json(coverage(model, keep_float)))
    run.write_json(
        "detections.json", to_coco_results(result.detections, [r.id for r in val.records]), indent=None
    )
    metrics = dict(facts) | {"model_bytes": model_bytes(model)} | result.metrics
    run.write_json("metrics.json", metrics)
    say(summary(metrics))
    return metrics


def recalibrate(model: nn.Module, data: DetectionData, images: int) -> None:
    """Measure batch norm's statistics again on `images` images spread over the data set; 0 = leave them."""
    if images:
        seen = recalibrate_bn(model, calibration_batches(model, data, images))
        say(f"batch norm recalibrated on {seen} images")


def correct(model: nn.Module, data: DetectionData, images: int) -> None:
    """Shift batch norm's statistics by the error of the weights, on `images` images; 0 = leave them."""
    if images:
        seen = correct_bn(model, partial(calibration_batches, model, data, images))
        say(f"batch norm corrected on {seen} images")


def calibration_batches(model: nn.Module, data: DetectionData, images: int) -> Iterator[list[Tensor]]:
    """Yield `images` images spread over the data set, ready for the model."""
    return image_batches(spread_images(data, images), 16, 1, next(model.parameters()).device)


def summary(metrics: Mapping[str, Any]) -> str:
    """Return the result in one line."""
    shown = [("VOC 11-point mAP", "voc07_map"), ("VOC area mAP", "voc_area_map"), ("COCO mAP", "coco_map")]
    parts = [f"{name} {'-' if metrics[key] is None else format(metrics[key], '.3f')}" for name, key in shown]
    return (
        f"{metrics['precision']}: {', '.join(parts)} over {len(metrics['scored_classes'])} classes, "
        f"{metrics['images']} images"
    )
