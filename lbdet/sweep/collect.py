"""What did the cells of a sweep give? One record a cell, one summary a point of the curve, as files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lbdet.build import build_task, is_classification
from lbdet.engine.run_folder import RunFolder
from lbdet.errors import UserError, joined
from lbdet.files import write_text
from lbdet.report import points, sweep_file
from lbdet.report.points import BYTES_KIND, Point, place_text, seeds_text
from lbdet.sweep.cells import Cell
from lbdet.sweep.facts import facts, is_measured
from lbdet.sweep.run import Sweep

COLUMNS = (
    "series", "precision", "ratio", "seed", "metric", "bytes", "bits_per_weight", "zeros", "squared_error",
    "latency_ms", "steps", "state", "error",
)  # fmt: skip
Records = Sequence[points.Cell]


def known_records(folder: Path) -> Records:
    """Return what sweep.json tells already of its cells.

    Raises:
        UserError: a damaged file.
    """
    return sweep_file.read_sweep(folder).cells if (folder / sweep_file.FILE).exists() else ()


def collect(
    sweep: Sweep, cells: Sequence[Cell], problems: Mapping[str, str | None], known: Records, command: str
) -> sweep_file.Sweep:
    """Return what sweep.json holds: the cells of this call, finished or not, and the others that it had.

    Args:
        cells: of this call.
        problems: what went wrong, by the names of the cells that were tried.
        known: what sweep.json held before; other cells keep their commands, and errors until they are done.
        command: what the user typed.
    """
    config = sweep.config_of(cells[0])  # all cells have its task
    name, key = build_task(config).headline[0]
    tool = "train_cls.py" if is_classification(config) else "train_det.py"
    before = {record.name: record for record in known}
    records = [_record(sweep, cell, problems, before.get(cell.name), tool) for cell in cells]
    names = {cell.name for cell in cells}
    others = [_seen(_bare(record), record) for record in known if record.name not in names]
    return sweep_file.Sweep(
        version=1, metric=key, metric_name=name, cells=(*records, *others), command=command,
        folder=sweep.folder,
    )  # fmt: skip


def write(found: sweep_file.Sweep) -> None:
    """Write sweep.json, sweep.csv and sweep.md."""
    texts = {
        sweep_file.FILE: sweep_file.sweep_text(found),
        "sweep.csv": _csv(found),
        "sweep.md": markdown(found),
    }
    for name, text in texts.items():
        write_text(found.folder / name, text)


def markdown(found: sweep_file.Sweep) -> str:
    """Return the summary and the cells that failed as a Markdown text."""
    lines = [
        f"| series | precision | {found.metric_name} | over seeds | against float | MB | bits a weight "
        "| zeros |",
        "|---|---|---|---|---|---|---|---|",
        *map(_line, found.summary),
    ]
    failed = [f"* {cell.name}: {cell.error}" for cell in found.cells if cell.state == "failed"]
    missing = [cell.name for cell in found.cells if cell.state == "missing"]
    lines += ["", "Failed:", "", *failed] if failed else []
    lines += ["", f"Not run yet: {', '.join(missing)}"] if missing else []
    return "\n".join([*lines, "", f"Bytes: {BYTES_KIND}.", "", f"    {found.command}", ""])


def _line(point: Point) -> str:
    ratio = "" if point.ratio is None else f" (ratio {point.ratio:g})"
    spread = f"{point.lowest:.3f} to {point.highest:.3f}, " if len(point.seeds) > 1 else ""
    change = "" if point.against_float is None else f"{point.against_float:+.3f}, {place_text(point)}"
    size = "" if point.bytes is None else f"{point.bytes / 1e6:.2f}"
    bits = "" if point.bits_per_weight is None else f"{point.bits_per_weight:.2f}"
    zeros = "" if point.zeros is None else f"{point.zeros:.0%}"
    return (
        f"| {point.series}{ratio} | {point.precision} | {point.mean:.3f} | {spread}{seeds_text(point)} "
        f"| {change} | {size} | {bits} | {zeros} |"
    )


def _record(
    sweep: Sweep, cell: Cell, problems: Mapping[str, str | None], before: points.Cell | None, tool: str
) -> points.Cell:
    problem = problems.get(cell.name)
    record = points.Cell(
        series=cell.series, precision=str(cell.precision), weight_bits=cell.precision.weight_bits,
        act_bits=cell.precision.act_bits, ratio=cell.ratio, name=cell.name, folder=sweep.run(cell).path,
        seed=cell.seed, state="missing", command=sweep.command_of(cell, tool),
    )  # fmt: skip
    return replace(record, state="failed", error=problem) if problem else _seen(record, before)


def _bare(record: points.Cell) -> points.Cell:
    """Return a record without what its run told."""
    return replace(
        record, state="missing", error=None, metrics=None, bytes=None, bits_per_weight=None, zeros=None,
        squared_error=None, latency_ms=None, steps=None,
    )  # fmt: skip


def _seen(record: points.Cell, before: points.Cell | None) -> points.Cell:
    """Return a record with what its run tells now; one that has not been tried again keeps its failure."""
    run = RunFolder(record.folder)
    if not is_measured(run):
        return before if before and before.state == "failed" else record
    try:
        return replace(record, state="done", **facts(run))
    except UserError as error:  # damaged, or of another version
        return replace(record, state="failed", error=joined(error))


def _csv(found: sweep_file.Sweep) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([found.metric if column == "metric" else column for column in COLUMNS])
    writer.writerows(_row(cell, found.metric) for cell in found.cells)
    return file.getvalue()


def _row(cell: points.Cell, metric: str) -> Iterable[object]:
    flat = vars(cell) | {"metric": cell.value(metric)}
    return ("" if flat[column] is None else flat[column] for column in COLUMNS)
