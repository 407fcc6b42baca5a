"""`train_det.py`: train a detector at low precision and evaluate it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lbdet.build import build, build_schedule, build_settings, build_train_set, read_data
from lbdet.cli import exit_code
from lbdet.config import dump_config, load_config
from lbdet.engine.finish import finish
from lbdet.engine.progress import say
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.train import train


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, train, and return the exit code."""
    parser = argparse.ArgumentParser(prog="train_det.py", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", nargs="+", dest="settings")
    parser.add_argument("--output", metavar="RUN", help="default: runs/<name of the config>")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    args = parser.parse_args(argv)
    output = Path(args.output) if args.output else Path("runs") / Path(args.config).stem
    return exit_code(partial(_train, args.config, sum(args.settings, []), RunFolder(output), args.resume))


def _train(config_path: str, settings: Sequence[str], run: RunFolder, resume: bool) -> None:
    config = load_config(config_path, settings)
    run.refuse(dump_config(config), resume)
    if run.finished:
        say(f"{run.path}: is finished already; nothing to do")
        return
    train_set, val = build_train_set(config), read_data(config.data, config.data.val)
    built = build(config)
    run.start(dump_config(config))
    say(f"{len(train_set)} images to train on, {len(val.records)} to evaluate on; run folder {run.path}")
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
