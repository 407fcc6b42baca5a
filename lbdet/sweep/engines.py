"""Where do the cells of a sweep run? Here, one after the other, or on the machines of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from lbdet.engine.progress import say
from lbdet.errors import UserError, joined
from lbdet.sweep.cells import Cell
from lbdet.sweep.run import Sweep, run_cell

Engine = Callable[[Sweep, Sequence[Cell]], Iterable[tuple[Cell, str | None]]]
"""Yields each cell, and what went wrong with it, as it ends."""


def local(sweep: Sweep, cells: Sequence[Cell]) -> Iterator[tuple[Cell, str | None]]:
    """Run the cells in this process, one after the other."""
    for number, cell in enumerate(cells, 1):
        say(f"== {cell.name} ({number} of {len(cells)}) ==")
        yield cell, run_cell(sweep, cell)


def ray(sweep: Sweep, cells: Sequence[Cell]) -> Iterator[tuple[Cell, str | None]]:
    """Run the cells on a Ray cluster: that of RAY_ADDRESS, or one started on this machine.

    A cell takes as many cores as torch has threads in this process, so that its results are those of `local`,
    and a GPU where the cluster has one. Code, data and the sweep's folder must have the same paths on every
    machine.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        cluster: Any = import_module("ray")
    except ImportError:
        raise UserError("--engine: ray is not installed; pip install 'lbdet[ray]'") from None
    cluster.init(ignore_reinit_error=True, log_to_driver=False)
    needs: dict[str, Any] = {"num_cpus": torch.get_num_threads()}
    if cluster.cluster_resources().get("GPU"):
        needs["num_gpus"] = 1
    remote = cluster.remote(**needs)(_remote_cell)
    running = {remote.remote(sweep, cell, os.getcwd()): cell for cell in cells}
    while running:
        (done,), _ = cluster.wait(list(running), num_returns=1)
        cell = running.pop(done)
        try:
            problem = cluster.get(done)
        except cluster.exceptions.RayError as error:
            problem = f"{type(error).__name__}: {joined(error)[:200]}"
        say(f"{cell.name}: {problem or 'done'}")
        yield cell, problem


ENGINES: dict[str, Engine] = {"local": local, "ray": ray}
"""by name"""


def _remote_cell(sweep: Sweep, cell: Cell, folder: str) -> str | None:
    if not os.path.isdir(folder):
        return f"{folder}: must be a folder on every machine of the cluster, got none"
    os.chdir(folder)
    if not sweep.folder.is_dir():
        return f"{sweep.folder}: must be a folder that all machines share, got none"
    return run_cell(sweep, cell)
