"""What do a sweep's tables hold? A text and a value to sort by for each entry; empty columns are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from lbdet.report.points import Cell, Point, place_text, seeds_text
from lbdet.report.sweep_file import Sweep

Value: TypeAlias = float | str | None
MISSING = "–"
METRICS = {
    "voc07_map": "VOC 11-point mAP", "voc_area_map": "VOC area mAP", "coco_map": "COCO mAP",
    "coco_map50": "COCO mAP50", "top1": "top-1", "top5": "top-5",
}  # fmt: skip
"""the metrics of a cell that are shown, with their names"""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    value: Callable[[Any], Value]
    """what it is sorted by; None = not known"""
    text: Callable[[Any], str] = str
    """of a value, or of a row where `of_row` says so"""
    of_row: bool = False
    is_head: bool = False
    """whether its entries name the row"""
    is_number: bool = True


@dataclass(frozen=True)
class Entry:
    """One cell of a table."""

    text: str
    value: Value
    is_head: bool
    is_number: bool


@dataclass(frozen=True)
class Table:
    """A table for the page."""

    columns: list[Column]
    rows: list[list[Entry]]


def points_table(sweep: Sweep) -> Table:
    """List the points of a sweep, in its order."""
    floats = {point.sweep: point.bytes for point in sweep.summary if point.is_float}

    def times_smaller(point: Point) -> float | None:
        reference = floats.get(point.sweep)
        return reference / point.bytes if reference and point.bytes else None

    columns = [
        _name("series", lambda p: p.series),
        Column("precision", _width, lambda p: p.precision, of_row=True, is_head=True, is_number=False),
        Column("ratio", lambda p: p.ratio, "{:g}".format),
        Column("mean", lambda p: p.mean, "{:.3f}".format),
        Column("against float", lambda p: None if p.is_float else p.against_float, signed),
        Column("size, MB", lambda p: p.bytes, megabytes),
        Column("times smaller", times_smaller, "{:.1f}".format),
        Column("seeds", lambda p: len(p.seeds), seeds_text, of_row=True),
        Column("lowest", lambda p: p.lowest, "{:.3f}".format),
        Column("highest", lambda p: p.highest, "{:.3f}".format),
        Column("range of float's seeds", lambda p: place_text(p) or None, is_number=False),
    ]
    return _table(columns, sweep.summary)


def cells_table(sweep: Sweep) -> Table:
    """List the cells of a sweep, in its order."""
    columns = [
        _name("cell", lambda c: c.name),
        Column("state", lambda c: c.state, is_number=False),
        *(Column(name, partial(Cell.value, metric=key), "{:.3f}".format) for key, name in METRICS.items()),
        Column("size, MB", lambda c: c.bytes, megabytes),
        Column("bits a weight", lambda c: c.bits_per_weight, "{:.2f}".format),
        Column("zeros, %", lambda c: c.zeros, percent),
        Column("squared error, %", lambda c: c.squared_error, percent),
        Column("latency, ms", lambda c: c.latency_ms, "{:.1f}".format),
        Column("updates", lambda c: c.steps, "{:d}".format),
        Column("seed", lambda c: c.seed),
    ]
    return _table(columns, sweep.cells)


def signed(change: float) -> str:
    """Return a change with its sign.

    >>> signed(0.0123), signed(-0.0123), signed(-0.0001)
    ('+0.012', '−0.012', '0.000')
    """
    text = f"{abs(change):.3f}"
    return text if float(text) == 0 else ("+" if change > 0 else "\N{MINUS SIGN}") + text


def megabytes(count: float) -> str:
    """Return a size in megabytes, without the unit."""
    return f"{count / 1e6:.3f}"


def percent(share: float) -> str:
    """Return a share in per cent, without the sign."""
    return f"{100 * share:.1f}"


def _name(name: str, value: Callable[[Any], Value]) -> Column:
    return Column(name, value, is_head=True, is_number=False)


def _width(point: Point) -> float:
    """Return a number that is higher for wider points; the weights count first."""
    return (point.weight_bits or 32) * 100 + (point.act_bits or 32)


def _table(columns: Sequence[Column], items: Sequence[Point | Cell]) -> Table:
    used = [column for column in columns if any(column.value(item) is not None for item in items)]
    return Table(used, [[_entry(column, item) for column in used] for item in items])


def _entry(column: Column, item: Point | Cell) -> Entry:
    value = column.value(item)
    text = MISSING if value is None else column.text(item if column.of_row else value)
    return Entry(text, value, column.is_head, column.is_number)
