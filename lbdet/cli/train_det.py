"""`train_det.py`: train a detector at low precision and evaluate it."""

from __future__ import annotations

from collections.abc import Sequence

from lbdet.cli import training


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, train, and return the exit code."""
    return training.main(argv, "train_det.py", __doc__ or "", classification=False)
