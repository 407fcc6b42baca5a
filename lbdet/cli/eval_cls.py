"""`eval_cls.py`: evaluate a run, or a config's weights as they are, at one precision or several."""

from __future__ import annotations

from collections.abc import Sequence

from lbdet.cli import evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, evaluate, and return the exit code."""
    return evaluation.main(argv, "eval_cls.py", __doc__ or "", classification=True)
