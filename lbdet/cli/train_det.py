"""`train_det.py`: train a detector at low precision and evaluate it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from lbdet.build import (
    build,
    build_schedule,
    build_settings,
    build_train_set,
    check_batch_norm,
    download,
    read_data,
)  # fmt: skip
from lbdet.cli import exit_code
from lbdet.config import Config, dump_config, load_config
from lbdet.engine.finish import correct, finish
from lbdet.engine.progress import say
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.train import train
from lbdet.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, train, and return the exit code."""
    parser = argparse.ArgumentParser(prog="train_det.py", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", nargs="+", dest="settings"
    )
    parser.add_argument("--output", metavar="RUN", help="default: runs/<name of the config>")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument(
        "--download", action="store_true", help="fetch VOC2007 or VOC2012 into data.root first"
    )
    args = parser.parse_args(argv)
    output = Path(args.output) if args.output else Path("runs") / Path(args.config).stem
    return exit_code(partial(_train, args, RunFolder(output)))


def _train(args: argparse.Namespace, run: RunFolder) -> None:
    config = load_config(args.config, list(chain.from_iterable(args.settings)))
    if args.download:
        download(config.data)
    train_run(config, run, args.resume)


def train_run(config: Config, run: RunFolder, resume: bool) -> None:
    """Train what a config describes into a run folder and evaluate it;
    nothing happens if that was done already.
    """
    run.refuse(resume)
    if run.config.exists() and load_config(run.config) != config:
        raise UserError(
            f"{run.path}: the run has another config; resume it with --config {run.config} and no --set"
        )
    if run.finished:
        say(f"{run.path}: is finished already; nothing to do")
        return
    train_set, val = build_train_set(config), read_data(config.data, config.data.val)
    built = build(config)
    check_batch_norm(config, built.model)
    run.start(dump_config(config))
    say(f"{len(train_set)} images to train on, {len(val.records)} to evaluate on; run folder {run.path}")
    if not run.checkpoint.exists():
        correct(built.model, train_set.data, config.train.correct_bn)
    steps = train(
        built.model, train_set, val, config.data.score_classes, build_schedule(config.schedule),
        build_settings(config), run, config.seed,
    )  # fmt: skip
    finish(
        built.model, train_set.data, val, run,
        architecture=config.model.name,
        score_classes=config.data.score_classes,
        max_images=config.eval.max_images,
        batch_size=config.eval.batch_size,
        recalibrate_images=config.train.recalibrate_bn,
        keep_float=config.quantizer.keep_float,
        facts={"precision": str(config.schedule.target), "steps": steps, "seed": config.seed},
    )  # fmt: skip
