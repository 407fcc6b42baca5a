"""What does the page tell of one width? Its classes, its layers and its boxes, as plain data for the script.

A width is a point of the first sweep. Of several seeds, metrics are means over all, and layers and boxes are
those of the lowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Strict, TypeAdapter

from lbdet.report.photos import BoxRow
from lbdet.report.points import Cell, Point, by_series, place_text, seeds_text
from lbdet.report.sweep_file import FILE, Sweep, checked, read_json

CLASS_METRICS = {
    "voc07_map": ("voc07", "VOC 11-point AP"),
    "voc_area_map": ("voc_area", "VOC area AP"),
    "coco_map": ("coco", "COCO AP"),
}
"""Key and name of a class's AP by the metric of the sweep."""
Number = Annotated[float, Strict()]


@dataclass(frozen=True)
class _Scores:
    """What the page shows of a cell's metrics."""

    per_class: dict[str, dict[str, Number | None]] | None = None
    scored_classes: list[str] | None = None


@dataclass(frozen=True)
class _Layer:
    """What the page shows of a layer in coverage.json."""

    name: str
    weights: int | None = None
    bits: int | None = None
    act_bits: int | None = None
    zeros: float | None = None
    squared_error: float | None = None
    format: str | None = None
    reason: str | None = None
    levels: list[float] | int | None = None
    counts: list[int] | None = None


_SCORES, _LAYERS = TypeAdapter(_Scores), TypeAdapter(list[_Layer])


def widths(sweep: Sweep) -> list[Point]:
    """Return the points of the first sweep: narrow ones first, float last."""
    first = [point for point in sweep.summary if point.sweep == 0]
    return sorted(first, key=lambda p: (p.is_float, p.weight_bits or 32, p.act_bits or 32))


def series(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the series in the order of their names' first points, each with the places of its widths.

    Float is the last width of every series; a sweep of nothing else has it as a series.
    """
    floats = [i for i, point in enumerate(points) if point.is_float]
    places = {point.key: i for i, point in enumerate(points)}
    groups = {name: [places[point.key] for point in group] for name, group in by_series(points).items()}
    if not groups and floats:
        return [{"name": points[floats[0]].series, "widths": floats}]
    return [{"name": name, "widths": group + floats} for name, group in groups.items()]


def width_facts(
    sweep: Sweep, points: Sequence[Point], boxes: Mapping[tuple, list[list[BoxRow]]] | None
) -> dict[str, Any]:
    """Gather what the script shows.

    Args:
        sweep: whose metric and cells they are.
        points: as `widths` gives them.
        boxes: the rows of every photograph by the key of a point; None = there are no photographs.

    Raises:
        UserError: a coverage.json that cannot be read, or metrics by class that are damaged.
    """
    float_point = sweep.float_point
    reference = _scores(sweep, float_point.cells) if float_point else []
    levels: dict[tuple[float, ...], int] = {}
    facts = [
        {
            "series": point.series,
            "precision": point.precision,
            "ratio": point.ratio,
            "isFloat": point.is_float,
            "seeds": point.seeds,
            "seedsText": seeds_text(point),
            "mean": point.mean,
            "againstFloat": point.against_float,
            "placeText": place_text(point),
            "bytes": point.bytes,
            "classes": _classes(sweep.metric, _scores(sweep, point.cells), reference),
            "layers": _layers(point.cells[0], levels),
            "boxes": boxes[point.key] if boxes is not None else None,
        }
        for point in points
    ]
    return {"widths": facts, "series": series(points), "levels": [list(values) for values in levels]}


def _scores(sweep: Sweep, cells: Sequence[Cell]) -> list[_Scores]:
    where = sweep.folder / FILE
    return [checked(_SCORES, cell.metrics, f"{where}: {cell.name}: metrics") for cell in cells]


def _classes(metric: str, cells: Sequence[_Scores], floats: Sequence[_Scores]) -> list[list[Any]] | None:
    """Return [name, objects, AP of float, AP here] of each class in the mean that has objects."""
    key, _ = CLASS_METRICS.get(metric, (None, ""))
    first = cells[0]
    if key is None or first.per_class is None:
        return None
    rows = []
    for name in first.scored_classes or first.per_class:
        here = _mean_ap(cells, name, key)
        if here is not None:
            objects = first.per_class.get(name, {}).get("objects")
            rows.append([name, objects, _mean_ap(floats, name, key), here])
    return rows


def _mean_ap(cells: Sequence[_Scores], name: str, key: str) -> float | None:
    values = [(cell.per_class or {}).get(name, {}).get(key) for cell in cells]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _layers(cell: Cell, levels: dict[tuple[float, ...], int]) -> list[dict[str, Any]] | None:
    """Return the layers of a cell; `levels` numbers the lists of levels, which many layers share."""
    path = cell.folder / "coverage.json"
    if not path.is_file():
        return None
    return [_layer(layer, levels) for layer in checked(_LAYERS, read_json(path), path)]


def _layer(layer: _Layer, levels: dict[tuple[float, ...], int]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": layer.name, "weights": layer.weights, "bits": layer.bits, "actBits": layer.act_bits,
        "zeros": layer.zeros, "error": layer.squared_error, "format": layer.format, "reason": layer.reason,
    }  # fmt: skip
    values, counts = layer.levels, layer.counts
    if isinstance(values, list) and counts and len(values) == len(counts):
        rounded = tuple(float(f"{value:.5g}") for value in values)
        facts |= {"levels": levels.setdefault(rounded, len(levels)), "counts": counts}
    return facts
