"""Several processes of one group, started fast: a server imports lbdet once and forks them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import torch

import lbdet.cli.eval_det  # imported by the server, before it forks
import lbdet.cli.train_det  # noqa: F401
from lbdet.engine import distributed

SECONDS = 300
"""that a process may take"""
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.engine.ranks"])


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """a signal's number comes negative"""
    value: Any
    """what its task returned, None if it did not"""
    out: str
    err: str


def ranks(size: int, folder: Path, task: Callable[..., object], *arguments: object) -> list[Any]:
    """Call `task` in `size` processes of one group; return what each returned, tensors and plain data."""
    ended = processes(size, folder, _in_group, task, *arguments)
    assert [e.code for e in ended] == [0] * size, [e.err for e in ended]
    return [e.value for e in ended]


def processes(size: int, folder: Path, task: Callable[..., object], *arguments: object) -> list[Ended]:
    """Call `task` in `size` processes with the environment that torchrun gives them.

    A number that it returns is the exit code.
    """
    folder.mkdir(exist_ok=True)
    port = _free_port()
    started = [
        CONTEXT.Process(target=_process, args=(number, size, port, folder, task, arguments))
        for number in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
        process.kill()  # it hangs
        process.join()
    return [_ended(process.exitcode, folder, number) for number, process in enumerate(started)]


def _in_group(task: Callable[..., object], *arguments: object) -> object:
    with distributed.process_group():
        return task(*arguments)


def _process(
    number: int,
    size: int,
    port: int,
    folder: Path,
    task: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    set_start_method("fork", force=True)  # of those that load images: a server for each would take long
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    value = task(*arguments)
    torch.save(value, folder / f"value{number}")
    sys.exit(value if isinstance(value, int) else 0)


def _ended(code: int | None, folder: Path, number: int) -> Ended:
    assert code is not None
    value = folder / f"value{number}"
    loaded = torch.load(value, weights_only=False) if value.exists() else None
    value.unlink(missing_ok=True)
    out, err = ((folder / f"{name}{number}").read_text() for name in ("out", "err"))
    return Ended(code, loaded, out, err)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
