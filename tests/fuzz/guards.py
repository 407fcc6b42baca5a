"""What a reader of foreign files may not do: hang, take the machine's memory, write, run or call anything."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 20
"""for one case, which takes milliseconds; a machine may be busy"""
ADDRESS_SPACE = 4 << 30
"""bytes that may be asked for on top of what the process has; the machine outlives a bomb"""

_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen", "pickle.find_class",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
    "os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile",
)  # fmt: skip
"""audit events, see docs.python.org/3/library/audit_events.html"""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Hang(BaseException):
    """A case took too long. No `except Exception` of a reader may swallow it."""


class Watch:
    """Notes what the process does to the world outside while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.folder = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)  # can never be removed; does nothing while it is off

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or (event != "open" and event not in _FORBIDDEN):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING):
            return
        if self.folder and event in ("os.remove", "os.rmdir") and args[1] >= 0:
            return  # relative to an open folder, as tempfile cleans up its own
        places = args[:1] if event == "open" else args[:2]
        paths = [os.path.realpath(place) for place in places if isinstance(place, str | os.PathLike)]
        if self.folder and paths and all(f"{path}/".startswith(f"{self.folder}/") for path in paths):
            return
        self.seen.append(f"{event} {args!r:.300}")

    @contextmanager
    def watching(self, folder: Path | None) -> Iterator[None]:
        """Allow nothing but to write below `folder`."""
        self.folder = str(folder.resolve()) if folder else ""
        self.seen, self.on = [], True
        try:
            yield
        finally:
            self.on = False
        assert not self.seen, self.seen


WATCH = Watch()


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise `Hang` in the code that is still at it after so many seconds."""

    def stop(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_address_space(more: int = ADDRESS_SPACE) -> Iterator[None]:
    """Let allocations fail beyond `more` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def forget_peak() -> int:
    """Let the peak of resident memory begin anew at the present one; return it in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the peak of resident memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")
