"""What does the folder of a sweep say? Its `sweep.json` as typed facts; several sweeps as one.

The summary in the file is for other readers: here it is made again from the cells.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from lbdet.data import files
from lbdet.errors import UserError, one_line, short
from lbdet.report.points import Cell, Point, summarize

FILE = "sweep.json"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All cells of one sweep, or of several, and what they found."""

    version: Literal[1]
    metric: str
    metric_name: str
    cells: tuple[Cell, ...]
    command: str | None = None
    folder: Path = Path()

    @cached_property
    def summary(self) -> tuple[Point, ...]:
        """The points of the curve."""
        return summarize(self.cells, self.metric)

    @property
    def float_point(self) -> Point | None:
        """What the first sweep's points are compared with, if it has finished."""
        return next((point for point in self.summary if point.is_float and point.sweep == 0), None)


_SWEEP = TypeAdapter(Sweep)


def read_json(path: Path, limit: int = files.MAX_JSON) -> Any:
    """Read a JSON file; what JSON has no word for (nan, infinity) becomes None.

    Raises:
        UserError: as `files.read_json`.
    """
    return files.read_json(path, limit, parse_constant=lambda _: None)


def checked(kind: TypeAdapter[T], value: object, where: object) -> T:
    """Return a value that was read from a file as what it must be.

    Raises:
        UserError: it is something else; the message begins with `where`.
    """
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = one_line(".".join(map(str, first["loc"]))) or "top level"
        raise UserError(f"{where}: {place}: {first['msg'].lower()}, got {short(first['input'])}") from None


def read_sweep(folder: str | os.PathLike[str]) -> Sweep:
    """Read the `sweep.json` of a folder; the cells' own folders are not looked at.

    Raises:
        UserError: it is not there, or is not what a sweep leaves.
    """
    path = Path(folder, FILE)
    if not os.path.isfile(path):
        raise UserError(f"{folder}: must be the folder of a sweep, got no {FILE} in it")
    sweep = checked(_SWEEP, read_json(path), path)
    cells = tuple(replace(cell, folder=path.parent / cell.folder, sweep=0) for cell in sweep.cells)
    return replace(sweep, cells=cells, folder=path.parent)


def sweep_text(sweep: Sweep) -> str:
    """Return what stands in the `sweep.json` of one sweep."""
    cells = [_plain(cell) | {"folder": os.path.relpath(cell.folder, sweep.folder)} for cell in sweep.cells]
    points = [_plain(point) for point in sweep.summary]
    top = {"version": sweep.version, "command": sweep.command, "metric": sweep.metric,
           "metric_name": sweep.metric_name, "cells": cells, "summary": points}  # fmt: skip
    return json.dumps(top, indent=1) + "\n"


def join_sweeps(sweeps: Sequence[Sweep]) -> Sweep:
    """Return one sweep with the cells of all; of several, a series carries its folder's name.

    Raises:
        UserError: a folder that stands twice, or they are measured in different metrics.
    """
    first = sweeps[0]
    if len(sweeps) == 1:
        return first
    folders = [sweep.folder.resolve() for sweep in sweeps]
    for number, sweep in enumerate(sweeps):
        if folders[number] in folders[:number]:
            raise UserError(f"--sweep: folders must be different, got {sweep.folder} twice")
        if sweep.metric != first.metric:
            raise UserError(
                f"{sweep.folder / FILE}: metric: must be {first.metric!r} like that of {first.folder}, "
                f"got {sweep.metric!r}"
            )
    cells = [
        replace(cell, sweep=number, series=f"{name}: {cell.series}", name=f"{name}/{cell.name}")
        for number, (sweep, name) in enumerate(zip(sweeps, _names(sweeps), strict=True))
        for cell in sweep.cells
    ]
    command = "\n".join(sweep.command or "" for sweep in sweeps)
    return replace(first, cells=tuple(cells), command=command)


def _plain(width: Cell | Point) -> dict[str, Any]:
    return {key: value for key, value in vars(width).items() if key not in ("sweep", "cells")}


def _names(sweeps: Sequence[Sweep]) -> list[str]:
    """Return a short name a sweep: its folder's, or the path where two folders share it."""
    last = [sweep.folder.resolve().name for sweep in sweeps]
    return [
        name if last.count(name) == 1 else str(sweep.folder) for name, sweep in zip(last, sweeps, strict=True)
    ]
