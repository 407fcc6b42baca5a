"""Scalars for TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def scalars(folder: Path | None, first_step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes the numbers of a log record under its `step`, or does nothing.

    Args:
        folder: of the event files, made at need; None = nothing is written.
        first_step: where a resumed run goes on; what an earlier one wrote from there on is hidden.
    """
    if folder is None:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield lambda record: None
        return
    with SummaryWriter(str(folder), purge_step=first_step) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, record["step"])

        yield write
