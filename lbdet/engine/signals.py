"""Stop when it suits: SIGINT and SIGTERM are noted, and acted on at the end of an update."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal asked to stop; the checkpoint is written. The message tells how to go on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list instead of dying; a second one kills as usual."""
    received: list[int] = []

    def note(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous: dict[int, Any] = {
        signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
