"""What `train_det.py` and `train_cls.py` share: train a model at low precision and evaluate it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lbdet.build import check_kind, download
from lbdet.cli import add_settings, exit_code
from lbdet.config import load_config
from lbdet.engine import distributed
from lbdet.engine.run_folder import RunFolder
from lbdet.experiment import train_run


def main(argv: Sequence[str] | None, tool: str, about: str, classification: bool) -> int:
    """Parse the arguments, train, and return the exit code."""
    parser = argparse.ArgumentParser(prog=tool, description=about)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="what to train, such as those in configs/"
    )
    add_settings(parser)
    parser.add_argument(
        "--output", metavar="RUN", help="the run's folder; default: runs/<name of the config>"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the data set into data.root first: "
        + ("CIFAR-10 or CIFAR-100" if classification else "VOC2007 or VOC2012"),
    )
    with distributed.only_first_speaks():
        args = parser.parse_args(argv)
    output = Path(args.output) if args.output else Path("runs") / Path(args.config).stem
    return exit_code(partial(_train, args, RunFolder(output), classification))


def _train(args: argparse.Namespace, run: RunFolder, classification: bool) -> None:
    with distributed.process_group():
        config = load_config(args.config, args.settings)
        check_kind(config, classification)
        if args.download:
            distributed.first(partial(download, config.data))
        train_run(config, run, args.resume)
