"""What does the folder of a sweep say? Its `sweep.json` as typed facts; several sweeps as one.

cell   one run: a series, a precision, a seed          its folder holds what every run leaves
point  the cells of one series and precision           the mean over the seeds that are done, and its range
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from lbdet.data import files
from lbdet.errors import UserError, one_line, short

FILE = "sweep.json"
FLOAT_SERIES = "float"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a cell and its point have in common."""

    series: str
    precision: str
    weight_bits: int | None = None
    """None = float32"""
    act_bits: int | None = None
    """None = float32"""
    ratio: float | None = None
    """of the semi-analytical solver"""
    sweep: int = 0
    """the number of the sweep among those that were joined"""
    is_float: bool = False
    """whether the others are compared with it"""

    @property
    def key(self) -> tuple[int, str, str, float | None]:
        """What the cells of one point share."""
        return self.sweep, self.series, self.precision, self.ratio


@dataclass(frozen=True, kw_only=True)
class Point(_Place):
    """The cells of one series and precision together."""

    seeds: tuple[int, ...] = ()
    mean: float | None = None
    lowest: float | None = None
    highest: float | None = None
    bytes: int | None = None
    against_float: float | None = None
    word: str = ""
    """where it lies in the spread of the seeds"""


@dataclass(frozen=True, kw_only=True)
class Cell(_Place):
    """One run of a sweep."""

    name: str
    folder: Path
    state: Literal["done", "failed", "missing"]
    seed: int | None = None
    error: str | None = None
    command: str | None = None
    metrics: dict[str, Any] | None = None
    bytes: int | None = None
    bytes_kind: str | None = None
    bits_per_weight: float | None = None
    zeros: float | None = None
    squared_error: float | None = None
    latency_ms: float | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All cells and points of one sweep, or of several."""

    version: Literal[1]
    metric: str
    metric_name: str
    cells: tuple[Cell, ...]
    summary: tuple[Point, ...]
    command: str | None = None
    folder: Path = Path()

    def cells_of(self, point: Point) -> list[Cell]:
        """Return a point's finished cells, the lowest seed first."""
        found = [cell for cell in self.cells if cell.key == point.key and cell.state == "done"]
        return sorted(found, key=lambda cell: (cell.seed is None, cell.seed or 0))

    @property
    def float_point(self) -> Point | None:
        """What the first sweep's points are compared with, if it has finished."""
        return next((p for p in self.summary if p.is_float and p.sweep == 0 and self.cells_of(p)), None)

    @property
    def bytes_kind(self) -> str | None:
        """What the bytes of the quantized cells count, if it is the same for all."""
        kinds = {cell.bytes_kind for cell in self.cells if cell.bytes_kind and not cell.is_float}
        return kinds.pop() if len(kinds) == 1 else None


PlaceT = TypeVar("PlaceT", Cell, Point)
_SWEEP = TypeAdapter(Sweep)


def read_json(path: Path, limit: int = files.MAX_JSON) -> Any:
    """Read a JSON file; what JSON has no word for (nan, infinity) becomes None.

    Raises:
        UserError: as `files.read_json`.
    """
    return files.read_json(path, limit, parse_constant=lambda _: None)


def read_sweep(folder: str | os.PathLike[str]) -> Sweep:
    """Read the `sweep.json` of a folder; the cells' own folders are not looked at.

    Raises:
        UserError: it is not there, or is not what a sweep leaves.
    """
    path = Path(folder, FILE)
    if not os.path.isfile(path):
        raise UserError(f"{folder}: must be the folder of a sweep, got no {FILE} in it")
    try:
        sweep = _SWEEP.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = one_line(".".join(map(str, first["loc"]))) or "top level"
        raise UserError(f"{path}: {where}: {first['msg'].lower()}, got {short(first['input'])}") from None
    cells = (replace(cell, folder=path.parent / cell.folder) for cell in sweep.cells)
    return _renamed(replace(sweep, cells=tuple(cells), folder=path.parent), 0, "")


def join_sweeps(sweeps: Sequence[Sweep]) -> Sweep:
    """Return one sweep with the cells and points of all; of several, a series carries its folder's name.

    Raises:
        UserError: they are measured in different metrics.
    """
    first = sweeps[0]
    if len(sweeps) == 1:
        return first
    for sweep in sweeps[1:]:
        if sweep.metric != first.metric:
            raise UserError(
                f"{sweep.folder / FILE}: metric: must be {first.metric!r} like that of {first.folder}, "
                f"got {sweep.metric!r}"
            )
    named = [
        _renamed(sweep, number, name)
        for number, (sweep, name) in enumerate(zip(sweeps, _names(sweeps), strict=True))
    ]
    return replace(
        first,
        cells=tuple(cell for sweep in named for cell in sweep.cells),
        summary=tuple(point for sweep in named for point in sweep.summary),
        command="\n".join(sweep.command or "" for sweep in sweeps),
    )


def _names(sweeps: Sequence[Sweep]) -> list[str]:
    """Return a short name a sweep: its folder's, or the path where two folders share it."""
    short = [sweep.folder.resolve().name for sweep in sweeps]
    return [
        name if short.count(name) == 1 else str(sweep.folder)
        for name, sweep in zip(short, sweeps, strict=True)
    ]


def _renamed(sweep: Sweep, number: int, name: str) -> Sweep:
    """Return the sweep with its number in all places, and its name, if it has one, in front of theirs."""
    first, path = (f"{name}: ", f"{name}/") if name else ("", "")
    cells = [replace(cell, name=path + cell.name) for cell in sweep.cells]
    return replace(
        sweep,
        cells=tuple(_moved(cell, number, first) for cell in cells),
        summary=tuple(_moved(point, number, first) for point in sweep.summary),
    )


def _moved(place: PlaceT, number: int, prefix: str) -> PlaceT:
    is_float = place.series == FLOAT_SERIES or place.is_float
    return replace(place, sweep=number, series=prefix + place.series, is_float=is_float)
