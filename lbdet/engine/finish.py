"""The end of a run: recalibrate, save, evaluate, and leave the files that tell the result."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lbdet.convert import calibrate_activations, correct_bn, coverage, coverage_json, model_bytes
from lbdet.data.records import spread_images
from lbdet.engine import distributed
from lbdet.engine.progress import say
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.task import Task
from lbdet.nn.batch_norm import recalibrate_bn

_BATCH = 16


def finish(
    model: nn.Module,
    task: Task,
    train_data: Any,
    val: Any,
    run: RunFolder,
    architecture: str,
    max_images: int | None,
    batch_size: int,
    recalibrate_images: int,
    keep_float: Sequence[str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Evaluate a trained model and write the run's results; metrics.json, the mark of the end, comes last.

    Args:
        train_data, val: of the task's kind.
        recalibrate_images: as for `recalibrate`, which comes first.
        facts: what else belongs into metrics.json (precision, steps, seed).

    Returns:
        The content of metrics.json.
    """
    recalibrate(model, task, train_data, recalibrate_images)
    run.save_model(model, architecture, val.classes, facts["precision"])
    measured, files = task.evaluate(model, spread_images(val, max_images), batch_size)
    run.write_json("coverage.json", coverage_json(coverage(model, keep_float)))
    for name, content in files.items():
        run.write_json(name, content, indent=None)
    metrics = dict(facts) | {"model_bytes": model_bytes(model)} | measured
    run.write_json("metrics.json", metrics)
    say(summary(task, metrics))
    return metrics


def recalibrate(model: nn.Module, task: Task, data: Any, images: int) -> None:
    """Measure batch norm's statistics again on `images` images spread over the data set; 0 = leave them."""
    if images:
        seen = recalibrate_bn(model, _inputs(model, task, data, images))
        distributed.same_state(model)
        say(f"batch norm recalibrated on {seen} images")


def correct(model: nn.Module, task: Task, data: Any, images: int) -> None:
    """Shift batch norm's statistics by the error of the weights, on `images` images; 0 = leave them."""
    if images:
        seen = correct_bn(model, partial(_inputs, model, task, data, images))
        distributed.same_state(model)
        say(f"batch norm corrected on {seen} images")


def calibrate(
    model: nn.Module,
    task: Task,
    data: Any,
    images: int,
    use_batch_statistics: bool = False,
    names: Collection[str] | None = None,
) -> None:
    """Set the ranges of activations, if there are any, on `images` images spread over the data set."""
    inputs = partial(_inputs, model, task, data, images)
    seen = calibrate_activations(model, inputs, use_batch_statistics, names)
    distributed.same_state(model)
    if seen:
        say(f"activations calibrated on {seen} images")


def summary(task: Task, metrics: Mapping[str, Any]) -> str:
    """Return the result in one line."""
    shown = [(name, metrics[key]) for name, key in task.headline]
    parts = [f"{name} {'-' if value is None else format(value, '.3f')}" for name, value in shown]
    over = f" over {len(metrics['scored_classes'])} classes" if "scored_classes" in metrics else ""
    return f"{metrics['precision']}: {', '.join(parts)}{over}, {metrics['images']} images"


def _inputs(model: nn.Module, task: Task, data: Any, images: int) -> Iterator[list[Tensor] | Tensor]:
    return task.inputs(spread_images(data, images), _BATCH, next(model.parameters()).device)
