"""`schedule.py`: show which layer has which width when, and the learning rate, before anything is trained."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lbdet.build import build, build_blocks, build_settings, build_train_set, is_classification
from lbdet.cli import add_settings, exit_code
from lbdet.config import Config, load_config
from lbdet.convert import scheduled_layers
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.files import write_atomically
from lbdet.precision import Precision
from lbdet.report.plan import draw_plan
from lbdet.report.timeline import Timeline, describe

SUFFIXES = (".png", ".svg", ".pdf")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, show the schedule, and return the exit code."""
    parser = argparse.ArgumentParser(prog="schedule.py", description=__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="of a training, such as those in configs/"
    )
    add_settings(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of it, .png, .svg or .pdf")
    args = parser.parse_args(argv)
    return exit_code(partial(_show, args.config, args.settings, args.plot))


def _show(path: str, settings: Sequence[str], plot: Path | None) -> None:
    if plot is not None:
        _check_plot(plot)
    config = load_config(path, settings)
    timeline = build_timeline(config)
    say(describe(timeline, config.model.name))
    if plot is None:
        return
    if not timeline.total:
        raise UserError("--plot: must have an update to show, got none; raise train.max_steps or epochs")
    stochastic = ", stochastic" if config.schedule.stochastic else ""
    title = f"{Path(path).stem}: {config.schedule.name}{stochastic}, {timeline.total} updates"
    figure = draw_plan(timeline, title)
    write_atomically(plot, partial(figure.savefig, format=plot.suffix[1:].lower(), dpi=150))
    say(f"\n{plot}: written")


def build_timeline(config: Config) -> Timeline:
    """Gather what a training would do; the weights are not read, the training data are.

    Raises:
        UserError: as `build_train_set`, `build` and `build_blocks`; a stage without updates.
    """
    is_classification(config)
    train_set = build_train_set(config)
    schedule, settings = config.schedule.build(config.seed), build_settings(config)
    schedule.check(settings.total_steps(len(train_set)))
    untrained = {"weights": None, "weights_backbone": None, "weights_classes": None}
    config = config.model_copy(update={"model": config.model.model_copy(update=untrained)})
    with contextlib.redirect_stdout(io.StringIO()):  # of a coverage of weights that do not count
        built = build(config, train_set.data.classes)
    scheduled = set(scheduled_layers(built.model))
    return Timeline(
        schedule,
        settings,
        len(train_set),
        layers=tuple(layer.name for layer in built.coverage),
        fixed={x.name: Precision(x.bits, x.act_bits) for x in built.coverage if x.name not in scheduled},
        blocks=build_blocks(config, built.model),
    )


def _check_plot(path: Path) -> None:
    """Refuse a picture that could not be written.

    Raises:
        UserError: saying why.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot: must end in {', '.join(SUFFIXES)}, got {path}")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--plot: must be a file in a folder that can be written to, got {path}")
