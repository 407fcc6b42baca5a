"""`sweep_bits.py`: mAP against bit-width. Trains and evaluates one detector or classifier at several widths.

The cells of a sweep are ordinary runs in DIR/cells; a second call does only what is missing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from lbdet.cli import exit_code
from lbdet.engine import distributed
from lbdet.engine.progress import say
from lbdet.errors import UserError
from lbdet.precision import Precision
from lbdet.sweep.cells import MODES, Cell, plan_cells
from lbdet.sweep.collect import collect, known_cells, markdown, write
from lbdet.sweep.engines import ENGINES
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
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", nargs="+", dest="settings"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="local")
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    command = f"python tools/sweep_bits.py {' '.join(shlex.quote(a) for a in arguments)}"
    return exit_code(partial(_sweep, args, command))


def _sweep(args: argparse.Namespace, command: str) -> None:
    distributed.refuse_many("sweep_bits.py")
    sweep = Sweep(args.config, tuple(chain.from_iterable(args.settings)), Path(args.output))
    precisions = [Precision.parse(text) for text in args.precisions]
    cells = plan_cells(precisions, args.mode, args.seeds, args.ratios)
    for cell in cells:  # what is impossible is told before anything runs
        sweep.config_of(cell)
    known = known_cells(sweep.folder)
    problems: dict[str, str | None] = {}
    shown = [*cells, *(cell for cell in known if cell not in cells)]
    _make(sweep)
    starts = [cell for cell in cells if cell.mode == "float"]
    for wave in (starts, [cell for cell in cells if cell not in starts]):
        for cell, problem in ENGINES[args.engine](sweep, wave):
            problems[cell.name] = problem
            if problem:
                say(f"{cell.name} failed: {problem}")
            write(sweep, collect(sweep, shown, problems, command))
    say("")
    say(markdown(collect(sweep, shown, problems, command)))
    write_report([sweep.folder])
    _raise_if_failed(problems, cells, sweep)


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
