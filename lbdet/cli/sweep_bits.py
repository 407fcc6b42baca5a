"""`sweep_bits.py`: mAP against bit-width. Trains and evaluates one detector or classifier at several widths.

The cells of a sweep are ordinary runs in DIR/cells; a second call does only what is missing, and must give
the cells that are there the settings that they have.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lbdet.cli import add_settings, exit_code
from lbdet.engine import distributed
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.precision import Precision
from lbdet.sweep.cells import MODES, Cell, plan_cells
from lbdet.sweep.collect import collect, known_records, markdown, write
from lbdet.sweep.engines import ENGINES
from lbdet.sweep.recipe import check_recipe
from lbdet.sweep.report import write_report
from lbdet.sweep.run import Sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run what is missing, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="sweep_bits.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--precisions", nargs="+", required=True, metavar="W4|W4A8|float")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument(
        "--mode", nargs="+", choices=MODES, default=["qat"],
        help="qat: train at each width; ptq: quantize the sweep's float cell; ptq+bn: and correct batch norm",
    )  # fmt: skip
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=[], metavar="R",
        help="use LBW's semi-analytical solver at each of these ratios; the best by mAP stands for a width",
    )  # fmt: skip
    add_settings(parser)
    parser.add_argument(
        "--at", action="append", default=[], metavar=("W2", "KEY.PATH=VALUE"), nargs="+",
        help="more settings, for the qat cells of one of the precisions; they come after those of --set",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="local")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    command = f"python tools/sweep_bits.py {' '.join(shlex.quote(a) for a in arguments)}"
    return exit_code(partial(_sweep, args, command))


def _sweep(args: argparse.Namespace, command: str) -> None:
    distributed.refuse_many("sweep_bits.py")
    precisions = [Precision.parse(text) for text in args.precisions]
    cells = plan_cells(precisions, args.mode, args.seeds, args.ratios)
    at = _settings_at(args.at, cells)
    sweep = Sweep(args.config, tuple(args.settings), Path(args.output), at)
    for cell in cells:  # what is impossible is told before anything runs
        check_recipe(sweep, cell)
    known = known_records(sweep.folder)
    problems: dict[str, str | None] = {}
    _make(sweep)
    starts = [cell for cell in cells if cell.mode == "float"]
    for wave in (starts, [cell for cell in cells if cell not in starts]):
        for cell, problem in ENGINES[args.engine](sweep, wave):
            problems[cell.name] = problem
            if problem:
                say(f"{cell.name} failed: {problem}")
            write(collect(sweep, cells, problems, known, command))
    say("")
    say(markdown(collect(sweep, cells, problems, known, command)))
    write_report([sweep.folder])
    _raise_if_failed(problems, cells, sweep)


def _settings_at(groups: Sequence[Sequence[str]], cells: Sequence[Cell]) -> Mapping[Precision, list[str]]:
    """Return the settings of each `--at` by its precision.

    Raises:
        UserError: a precision without a qat cell, or without a setting.
    """
    found: dict[Precision, list[str]] = {}
    trained = list(dict.fromkeys(cell.precision for cell in cells if cell.mode == "qat"))
    for text, *settings in groups:
        precision = Precision.parse(text)
        if precision not in trained:
            names = ", ".join(map(str, trained)) or "none"
            raise UserError(f"--at: must be a precision of the qat cells ({names}), got {text}")
        if not settings:
            raise UserError(f"--at {text}: must have a setting such as train.lr=0.002, got none")
        found.setdefault(precision, []).extend(settings)
    return found


def _make(sweep: Sweep) -> None:
    try:
        sweep.cells.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {sweep.folder} cannot be made: {error.strerror}") from None


def _raise_if_failed(problems: dict[str, str | None], cells: Sequence[Cell], sweep: Sweep) -> None:
    failed = [name for name, problem in problems.items() if problem]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; "
            f"the others are in {sweep.folder}/sweep.md; the same command tries them again"
        )
