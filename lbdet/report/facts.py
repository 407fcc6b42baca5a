"""What does the page tell of one width? Its classes, its layers and its boxes, as plain data for the script.

A width is a point of the first sweep that has a finished cell. Of several seeds, metrics are means over all,
and layers and boxes are those of the lowest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbdet.errors import UserError
from lbdet.report.photos import BoxRow
from lbdet.report.sweep_file import Cell, Point, Sweep, read_json

CLASS_METRICS = {
    "voc07_map": ("voc07", "VOC 11-point AP"),
    "voc_area_map": ("voc_area", "VOC area AP"),
    "coco_map": ("coco", "COCO AP"),
}
"""Key and name of a class's AP by the metric of the sweep."""


def widths(sweep: Sweep) -> list[Point]:
    """Return the points of the first sweep that can be looked at: narrow ones first, float last."""
    there = [point for point in sweep.summary if point.sweep == 0 and sweep.cells_of(point)]
    return sorted(there, key=lambda p: (p.is_float, p.weight_bits or 32, p.act_bits or 32))


def series(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the series in the order of their names' first points, each with the places of its widths.

    Float is the last width of every series; a sweep of nothing else has it as a series.
    """
    floats = [i for i, point in enumerate(points) if point.is_float]
    groups: dict[str, list[int]] = {}
    for i, point in enumerate(points):
        if not point.is_float:
            name = point.series if point.ratio is None else f"{point.series}, ratio {point.ratio:g}"
            groups.setdefault(name, []).append(i)
    if not groups and floats:
        return [{"name": points[floats[0]].series, "widths": floats}]
    return [{"name": name, "widths": places + floats} for name, places in groups.items()]


def width_facts(
    sweep: Sweep, points: Sequence[Point], boxes: Mapping[tuple, list[list[BoxRow]]] | None
) -> dict[str, Any]:
    """Gather what the script shows.

    Args:
        sweep: whose metric and cells they are.
        points: as `widths` gives them.
        boxes: the rows of every photograph by the key of a point; None = there are no photographs.

    Raises:
        UserError: a coverage.json that cannot be read.
    """
    reference = sweep.float_point
    float_cells = sweep.cells_of(reference) if reference else []
    levels: dict[tuple[float, ...], int] = {}
    facts = [
        {
            "series": point.series,
            "precision": point.precision,
            "isFloat": point.is_float,
            "seeds": [cell.seed for cell in sweep.cells_of(point)],
            "mean": point.mean,
            "againstFloat": None if point.is_float else point.against_float,
            "bytes": point.bytes,
            "classes": _classes(sweep.metric, sweep.cells_of(point), float_cells),
            "layers": _layers(sweep.cells_of(point)[0], levels),
            "boxes": boxes[point.key] if boxes is not None else None,
        }
        for point in points
    ]
    return {"widths": facts, "series": series(points), "levels": [list(values) for values in levels]}


def _classes(metric: str, cells: Sequence[Cell], floats: Sequence[Cell]) -> list[list[Any]] | None:
    """Return [name, objects, AP of float, AP here] of each class in the mean that has objects."""
    key, _ = CLASS_METRICS.get(metric, (None, ""))
    metrics = cells[0].metrics or {}
    per_class = metrics.get("per_class")
    if key is None or not isinstance(per_class, dict):
        return None
    rows = []
    for name in metrics.get("scored_classes") or per_class:
        here = _mean_ap(cells, name, key)
        if here is not None:
            rows.append([name, per_class[name].get("objects"), _mean_ap(floats, name, key), here])
    return rows


def _mean_ap(cells: Sequence[Cell], name: str, key: str) -> float | None:
    values = [(((cell.metrics or {}).get("per_class") or {}).get(name) or {}).get(key) for cell in cells]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _layers(cell: Cell, levels: dict[tuple[float, ...], int]) -> list[dict[str, Any]] | None:
    """Return the layers of a cell; `levels` numbers the lists of levels, which many layers share."""
    path = cell.folder / "coverage.json"
    if not path.is_file():
        return None
    report = read_json(path)
    if not isinstance(report, list) or not all(isinstance(row, dict) and "name" in row for row in report):
        raise UserError(f"{path}: must be a list of layers with their names, got something else")
    return [_layer(row, levels) for row in report]


def _layer(row: Mapping[str, Any], levels: dict[tuple[float, ...], int]) -> dict[str, Any]:
    keys = {"name": "name", "weights": "weights", "bits": "bits", "actBits": "act_bits", "zeros": "zeros",
            "error": "squared_error", "format": "format", "reason": "reason"}  # fmt: skip
    layer = {ours: row.get(theirs) for ours, theirs in keys.items()}
    values, counts = row.get("levels"), row.get("counts")
    if isinstance(values, list) and isinstance(counts, list) and len(values) == len(counts) > 0:
        rounded = tuple(float(f"{value:.5g}") for value in values)
        layer |= {"levels": levels.setdefault(rounded, len(levels)), "counts": counts}
    return layer
