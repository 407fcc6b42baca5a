"""Starts trainings fast: imports lbdet once and forks. Reads a JSON list of arguments a line, prints the pid,
and the exit status when the training has ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

import torch

from lbdet.cli import train_det

torch.set_num_threads(1)


def child(arguments: list[str], file_bytes: int | None) -> None:
    """Train in this process; no file may grow beyond `file_bytes`."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    code = 1
    try:
        code = train_det.main(arguments)
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Serve until stdin ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request["arguments"], request["file_bytes"])
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
