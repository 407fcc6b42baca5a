"""What `eval_det.py` and `eval_cls.py` share: evaluate a model at one precision or several."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lbdet.build import Built, build, build_task, check_kind, load_run, read_data
from lbdet.cli import add_settings, exit_code
from lbdet.config import load_config
from lbdet.convert import (
    check_width,
    coverage,
    model_bytes,
    quantized_layers,
    set_float,
    set_precision,
    set_scheduled_precision,
    uncalibrated,
)  # fmt: skip
from lbdet.data.files import read_json
from lbdet.data.labelled import LabelledData
from lbdet.data.records import DetectionData, spread_images
from lbdet.engine import distributed
from lbdet.engine.finish import calibrate, correct, recalibrate, summary
from lbdet.engine.manifest import other_data
from lbdet.engine.optim import average_start
from lbdet.engine.progress import say
from lbdet.errors import UserError, one_line
from lbdet.files import write_text
from lbdet.precision import FLOAT, Precision


def main(argv: Sequence[str] | None, tool: str, about: str, classification: bool) -> int:
    """Parse the arguments, evaluate, and return the exit code."""
    parser = argparse.ArgumentParser(prog=tool, description=about)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="a folder that training left")
    source.add_argument("--config", metavar="FILE", help="the config's weights without training")
    add_settings(parser)
    parser.add_argument(
        "--precision", nargs="+", metavar="W4|float",
        help="default: the run's own; float = the weights as they are, unrounded",
    )  # fmt: skip
    parser.add_argument("--split", metavar="NAME", help="such as 2012:val; default: the config's data.val")
    bn = parser.add_mutually_exclusive_group()
    bn.add_argument(
        "--recalibrate-bn", type=int, default=0, metavar="N",
        help="measure batch norm's statistics anew on N training images at each precision",
    )  # fmt: skip
    bn.add_argument(
        "--correct-bn", type=int, default=0, metavar="N",
        help="shift batch norm's statistics by what each precision changes on N training images",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="write the metrics of all precisions as JSON")
    with distributed.only_first_speaks():
        args = parser.parse_args(argv)
    return exit_code(partial(_evaluate_together, args, classification))


def _evaluate_together(args: argparse.Namespace, classification: bool) -> None:
    with distributed.process_group():
        _evaluate(args, classification)


def _evaluate(args: argparse.Namespace, classification: bool) -> None:
    if args.run and args.settings:
        raise UserError(
            f"--set: a run keeps its config, got {args.settings[0]!r}; "
            "use --config, or --precision and --split"
        )
    precisions = [Precision.parse(text) for text in args.precision or ()]
    for option, images in (("--recalibrate-bn", args.recalibrate_bn), ("--correct-bn", args.correct_bn)):
        if images < 0:
            raise UserError(f"{option}: must not be negative, got {images}")
    if args.output and (Path(args.output).is_dir() or not Path(args.output).absolute().parent.is_dir()):
        raise UserError(f"--output: must be a file in a folder that exists, got {args.output!r}")
    config = load_config(Path(args.run, "config.yaml") if args.run else args.config, args.settings)
    check_kind(config, classification)
    if args.run and args.correct_bn and config.schedule.target != FLOAT:
        raise UserError(
            f"--correct-bn: is for weights trained at float, got a run trained at {config.schedule.target}; "
            "use --recalibrate-bn"
        )
    val = read_data(config.data, [args.split] if args.split else config.data.val)
    if args.run and not args.split:
        _warn_of_other_data(Path(args.run, "manifest.json"), val)
    val = spread_images(val, config.eval.max_images)
    if not len(val):
        raise UserError(f"--split: must hold images, got none in {args.split or config.data.val}")
    built = load_run(args.run) if args.run else build(config, val.classes)
    precisions = precisions or [config.schedule.target]
    for precision in precisions:
        _check(built.model, precision)
    needs_train = args.recalibrate_bn or args.correct_bn or any(p.act_bits for p in precisions)
    train = read_data(config.data, config.data.train) if needs_train else None
    unrounded = bool(args.run) and config.schedule.target != FLOAT and FLOAT in precisions
    results = measure(built, precisions, val, train, args.recalibrate_bn, args.correct_bn, unrounded)
    if unrounded:
        say("* this run's weights unrounded; for a float model evaluate a float run")
    if args.output and distributed.rank() == 0:
        text = json.dumps(results, indent=1) + "\n"
        write_text(Path(args.output), text)


def _warn_of_other_data(manifest: Path, val: DetectionData | LabelledData) -> None:
    """Say so where a run's evaluation data are not what they were, or not known; older runs tell nothing."""
    if not manifest.exists():
        return
    try:
        difference = other_data(read_json(manifest)["data"]["val"], val)
    except UserError as error:
        difference = str(error)
    except (KeyError, TypeError, ValueError):
        difference = f"{manifest}: must tell which data the run had, got something else"
    if difference:
        say(f"warning: {one_line(difference)}")


def measure(
    built: Built,
    precisions: Sequence[Precision],
    val: DetectionData | LabelledData,
    train: DetectionData | LabelledData | None,
    recalibrate_images: int = 0,
    correct_images: int = 0,
    unrounded: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate one model at several precisions, each from the same weights;
    metrics a precision, printed as they come, float with a star where it is `unrounded`.

    Activations at widths that the model was not trained at are calibrated on training images.
    """
    model, config, task = built.model, built.config, build_task(built.config)
    own = {name: layer.precision for name, layer in quantized_layers(model).items()}
    for precision in precisions:  # parameters of new widths are part of the state from here on
        _set(model, precision, own)
    start = average_start(model)
    results = []
    for precision in precisions:
        model.load_state_dict(start)
        _set(model, precision, own)
        if train is not None:
            correct(model, task, train, correct_images)
            if uncalibrated(model):
                calibrate(model, task, train, config.train.calibration_images, recalibrate_images > 0)
            recalibrate(model, task, train, recalibrate_images)
        metrics, _ = task.evaluate(model, val, config.eval.batch_size)
        errors = [c.squared_error for c in coverage(model) if c.squared_error is not None]
        facts = {
            "precision": str(precision),
            "model_bytes": model_bytes(model),
            "mean_squared_error": sum(errors) / len(errors) if errors else 0.0,
            "recalibrate_bn": recalibrate_images,
            "correct_bn": correct_images,
            "quantizer": config.quantizer.model_dump(mode="json"),
        }
        results.append(facts | metrics)
        shown = f"{precision}*" if unrounded and precision == FLOAT else str(precision)
        line = summary(task, results[-1] | {"precision": shown})
        say(f"{line}, {results[-1]['model_bytes'] / 1e6:.2f} MB")
    return results


def _check(model: nn.Module, precision: Precision) -> None:
    """Refuse a width that a layer's format does not have
    before the evaluation of the widths in front of it.
    """
    for layer in quantized_layers(model).values():
        if layer.scheduled:
            check_width(layer.weight_quantizer, layer.activation_quantizer, precision, "--precision")


def _set(model: nn.Module, precision: Precision, own: dict[str, Precision]) -> None:
    """Set the width of all scheduled layers; the others keep their own, but "float" means every layer."""
    if precision == FLOAT:
        set_float(model)
    else:
        set_precision(model, own)
        set_scheduled_precision(model, precision)
