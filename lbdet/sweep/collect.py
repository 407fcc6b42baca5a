"""What did the cells of a sweep give? One record a cell, one summary a point of the curve, as files."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbdet.build import build_task, is_classification
from lbdet.data.files import read_json
from lbdet.errors import UserError, joined
from lbdet.files import write_text
from lbdet.precision import Precision
from lbdet.sweep.cells import Cell
from lbdet.sweep.facts import BYTES_KIND, facts, is_measured
from lbdet.sweep.run import Sweep

COLUMNS = (
    "series", "precision", "ratio", "seed", "metric", "bytes", "bits_per_weight", "zeros", "squared_error",
    "latency_ms", "steps", "state", "error",
)  # fmt: skip


def collect(
    sweep: Sweep, cells: Sequence[Cell], problems: Mapping[str, str | None], command: str
) -> dict[str, Any]:
    """Return the content of sweep.json: records of all cells, finished or not, and the summary.

    Args:
        problems: what went wrong, by the names of the cells that were tried.
        command: what the user typed.
    """
    config = sweep.config_of(cells[0])  # all cells have its task
    name, key = build_task(config).headline[0]
    tool = "train_cls.py" if is_classification(config) else "train_det.py"
    records = [_record(sweep, cell, problems, tool) for cell in cells]
    return {
        "version": 1, "command": command, "metric": key, "metric_name": name,
        "cells": records, "summary": summarize(records, key),
    }  # fmt: skip


def known_cells(folder: Path) -> list[Cell]:
    """Return the cells that sweep.json names already.

    Raises:
        UserError: a damaged file.
    """
    path = folder / "sweep.json"
    content: Any = read_json(path) if path.exists() else {"cells": []}
    try:
        return [
            Cell(c["mode"], Precision(c["weight_bits"], c["act_bits"]), c["seed"], c["ratio"])
            for c in content["cells"]
        ]
    except (KeyError, TypeError):
        raise UserError(f"{path}: must be the file of a sweep, got something else; remove it") from None


def write(sweep: Sweep, content: Mapping[str, Any]) -> None:
    """Write sweep.json, sweep.csv and sweep.md."""
    texts = {
        "sweep.json": json.dumps(content, indent=1) + "\n",
        "sweep.csv": _csv(content),
        "sweep.md": markdown(content),
    }
    for name, text in texts.items():
        write_text(sweep.folder / name, text)


def summarize(records: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return a point for each series and precision: the mean over seeds, its spread, and a word about it.

    Of several ratios the one of the best mean stands for its precision. The spread is the range over seeds.
    """
    done = [r for r in records if r["state"] == "done" and r["metrics"].get(metric) is not None]
    groups = [
        _point(list(group), metric)
        for _, group in itertools.groupby(sorted(done, key=_point_key), key=_point_key)
    ]
    points: dict[tuple[str, str], dict[str, Any]] = {}
    for point in groups:
        key = point["series"], point["precision"]
        if key not in points or point["mean"] > points[key]["mean"]:
            points[key] = point
    ordered = sorted(points.values(), key=_order)
    floats = next((p for p in ordered if p["series"] == "float"), None)
    return [point | _against(point, floats) for point in ordered]


def markdown(content: Mapping[str, Any]) -> str:
    """Return the summary and the cells that failed as a Markdown text."""
    lines = [
        f"| series | precision | {content['metric_name']} | over seeds | against float | MB | bits a weight "
        "| zeros |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in content["summary"]:
        ratio = "" if p["ratio"] is None else f" (ratio {p['ratio']:g})"
        spread = f"{p['lowest']:.3f} to {p['highest']:.3f}" if len(p["seeds"]) > 1 else "one seed"
        against = "" if p["against_float"] is None else f"{p['against_float']:+.3f}, {p['word']}"
        lines.append(
            f"| {p['series']}{ratio} | {p['precision']} | {p['mean']:.3f} | {spread} | {against} "
            f"| {p['bytes'] / 1e6:.2f} | {p['bits_per_weight']:.2f} | {p['zeros']:.0%} |"
        )
    failed = [f"* {c['name']}: {c['error']}" for c in content["cells"] if c["state"] == "failed"]
    missing = [c["name"] for c in content["cells"] if c["state"] == "missing"]
    lines += ["", "Failed:", "", *failed] if failed else []
    lines += ["", f"Not run yet: {', '.join(missing)}"] if missing else []
    return "\n".join([*lines, "", f"Bytes: {BYTES_KIND}.", "", f"    {content['command']}", ""])


def _record(sweep: Sweep, cell: Cell, problems: Mapping[str, str | None], tool: str) -> dict[str, Any]:
    run, problem = sweep.run(cell), problems.get(cell.name)
    state = "failed" if problem else "done" if is_measured(run) else "missing"
    record = {
        "name": cell.name, "folder": f"cells/{cell.name}", "series": cell.series, "mode": cell.mode,
        "precision": str(cell.precision), "weight_bits": cell.precision.weight_bits,
        "act_bits": cell.precision.act_bits, "seed": cell.seed, "ratio": cell.ratio,
        "state": state, "error": problem, "command": sweep.command_of(cell, tool),
    }  # fmt: skip
    try:
        return record | (facts(run) if state == "done" else {})
    except UserError as error:  # damaged, or of another version
        return record | {"state": "failed", "error": joined(error)}


def _point_key(record: Mapping[str, Any]) -> tuple[str, str, float]:
    return record["series"], record["precision"], record["ratio"] or 0.0


def _point(records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    values = [record["metrics"][metric] for record in records]
    same = (
        "series",
        "mode",
        "precision",
        "weight_bits",
        "act_bits",
        "ratio",
        "bytes",
        "bits_per_weight",
        "zeros",
    )
    return {key: records[0][key] for key in same} | {
        "seeds": sorted(record["seed"] for record in records),
        "mean": sum(values) / len(values), "lowest": min(values), "highest": max(values),
    }  # fmt: skip


def _order(point: Mapping[str, Any]) -> tuple[Any, ...]:
    bits = [-(point[key] or 99) for key in ("weight_bits", "act_bits")]
    return point["series"] != "float", point["series"], *bits


def _against(point: Mapping[str, Any], floats: Mapping[str, Any] | None) -> dict[str, Any]:
    if floats is None or point["series"] == "float":
        return {"against_float": None, "word": ""}
    difference = point["mean"] - floats["mean"]
    seeds = min(len(point["seeds"]), len(floats["seeds"]))
    spread = max(p["highest"] - p["lowest"] for p in (point, floats))
    side = "inside" if abs(difference) <= spread else "outside"
    word = "one seed: no spread" if seeds < 2 else f"{side} the spread of the seeds"
    return {"against_float": difference, "word": word}


def _csv(content: Mapping[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([content["metric"] if column == "metric" else column for column in COLUMNS])
    writer.writerows(_row(record, content["metric"]) for record in content["cells"])
    return file.getvalue()


def _row(record: Mapping[str, Any], metric: str) -> Iterable[Any]:
    flat = dict(record) | {"metric": record.get("metrics", {}).get(metric)}
    return ("" if flat.get(column) is None else flat[column] for column in COLUMNS)
