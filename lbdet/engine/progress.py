"""Progress for a person: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def track(items: Iterable[T], total: int, name: str) -> Iterator[T]:
    """Yield the items and show how many of `total` have passed.

    On a terminal a bar; elsewhere a line now and then, which reads well in a log file.
    """
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as progress:
            yield from progress.track(items, total=total, description=name)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > SECONDS_BETWEEN_LINES and done < total:
            last = time.monotonic()
            say(f"{name}: {done}/{total}")
