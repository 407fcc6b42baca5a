"""`report.py`: the curve and the page of a sweep, from the files that it left; no model is run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lbdet.cli import exit_code
from lbdet.sweep.report import PHOTOS, SCORE, write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, write the report, and return the exit code."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__)
    parser.add_argument(
        "--sweep", required=True, nargs="+", type=Path, metavar="DIR",
        help="folders of sweeps; all are in the curve and the tables, the photographs show the first",
    )  # fmt: skip
    parser.add_argument(
        "--photos", type=int, default=PHOTOS, metavar="N",
        help=f"how many photographs are shown (default {PHOTOS}); 0 = none, and the data are not read",
    )  # fmt: skip
    parser.add_argument(
        "--score", type=float, default=SCORE, help=f"least score of a box that is shown (default {SCORE})"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html",
        help="the page, and beside it the curve as .png and .svg; "
        "default: report.html, sweep.png and sweep.svg in the first DIR",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return exit_code(partial(write_report, args.sweep, args.photos, args.score, args.output))
