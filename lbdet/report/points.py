"""What did a sweep find? Its runs are cells; the cells of one series and precision are a point of its curve.

place    the mean over a point's seeds, against the range of float's seeds
below    under the lowest
inside   between the two, or on them
above    over the highest
None     float has fewer than two seeds that are done, or the point is float
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

BYTES_KIND = "packed files, batch norm folded"
"""what sizes count"""


@dataclass(frozen=True, kw_only=True)
class _Width:
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

    @property
    def is_float(self) -> bool:
        """Whether the others are compared with it."""
        return self.precision == "float"

    @property
    def key(self) -> tuple[int, str, str, float | None]:
        """What the cells of one point share."""
        return self.sweep, self.series, self.precision, self.ratio


@dataclass(frozen=True, kw_only=True)
class Cell(_Width):
    """One run of a sweep."""

    name: str
    folder: Path
    state: Literal["done", "failed", "missing"]
    seed: int = 0
    error: str | None = None
    command: str | None = None
    metrics: dict[str, Any] | None = None
    bytes: int | None = None
    bits_per_weight: float | None = None
    zeros: float | None = None
    squared_error: float | None = None
    latency_ms: float | None = None
    steps: int | None = None

    def value(self, metric: str) -> float | None:
        """Return one of the metrics, None where it is no number or the cell is not done."""
        value = (self.metrics or {}).get(metric) if self.state == "done" else None
        return float(value) if isinstance(value, float | int) else None


@dataclass(frozen=True, kw_only=True)
class Point(_Width):
    """The cells of one series and precision together."""

    mean: float
    lowest: float
    highest: float
    cells: tuple[Cell, ...] = ()
    """those that are done, the lowest seed first"""
    seeds: tuple[int, ...] = ()
    """theirs"""
    failed: int = 0
    """cells"""
    planned: int = 0
    """cells of this point, or finished ones of float where those are more"""
    bytes: int | None = None
    bits_per_weight: float | None = None
    zeros: float | None = None
    against_float: float | None = None
    """the mean minus float's; None for float, and where there is no float"""
    place: Literal["below", "inside", "above"] | None = None


def summarize(cells: Sequence[Cell], metric: str) -> tuple[Point, ...]:
    """Return a point for each series and precision with a finished cell: float first, then wide to narrow.

    Of several ratios the one of the best mean stands for its precision.
    """
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.key, []).append(cell)
    best: dict[tuple, Point] = {}
    for group in groups.values():
        point = _point(group, metric)
        if point is not None and (point.key[:3] not in best or point.mean > best[point.key[:3]].mean):
            best[point.key[:3]] = point
    floats = {point.sweep: point for point in best.values() if point.is_float}
    return tuple(_against(point, floats.get(point.sweep)) for point in sorted(best.values(), key=_order))


def by_series(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Return the quantized points of each series, whatever their ratios; they make one line."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        if not point.is_float:
            groups.setdefault(point.series, []).append(point)
    return groups


def place_text(point: Point) -> str:
    """Say where a point lies against float's seeds; nothing where there is no float to compare with."""
    if point.against_float is None:
        return ""
    return f"{point.place} float's range" if point.place else "no spread: float has one seed"


def seeds_text(point: Point) -> str:
    """Say how many seeds a point has, how many it should have, and how many failed:
    "3 seeds", "2 of 3 seeds, 1 failed".
    """
    done = len(point.seeds)
    whole = "one seed" if done == 1 else f"{done} seeds"
    text = f"{done} of {point.planned} seeds" if done < point.planned else whole
    return f"{text}, {point.failed} failed" if point.failed else text


def _point(cells: Sequence[Cell], metric: str) -> Point | None:
    done = sorted((c for c in cells if c.value(metric) is not None), key=lambda cell: cell.seed)
    if not done:
        return None
    first, values = done[0], [cell.value(metric) or 0.0 for cell in done]
    return Point(
        series=first.series, precision=first.precision, weight_bits=first.weight_bits,
        act_bits=first.act_bits, ratio=first.ratio, sweep=first.sweep,
        mean=sum(values) / len(values), lowest=min(values), highest=max(values),
        cells=tuple(done), seeds=tuple(cell.seed for cell in done),
        failed=sum(cell.state == "failed" for cell in cells), planned=len(cells),
        bytes=first.bytes, bits_per_weight=first.bits_per_weight, zeros=first.zeros,
    )  # fmt: skip


def _order(point: Point) -> tuple[Any, ...]:
    return (point.sweep, not point.is_float, point.series,
            -(point.weight_bits or 99), -(point.act_bits or 99))  # fmt: skip


def _against(point: Point, reference: Point | None) -> Point:
    if reference is None or point.is_float:
        return point
    planned = max(point.planned, len(reference.seeds))
    change = point.mean - reference.mean
    if len(reference.seeds) < 2:
        return replace(point, planned=planned, against_float=change)
    is_low, is_high = point.mean < reference.lowest, point.mean > reference.highest
    place = "below" if is_low else "above" if is_high else "inside"
    return replace(point, planned=planned, against_float=change, place=place)
