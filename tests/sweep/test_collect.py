"""What sweep.json, sweep.md and sweep.csv hold of the cells of a sweep."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from lbdet.config import dump_config
from lbdet.errors import UserError
from lbdet.precision import Precision
from lbdet.report import points
from lbdet.report.sweep_file import Sweep as Found
from lbdet.report.sweep_file import read_sweep
from lbdet.sweep.cells import Cell
from lbdet.sweep.collect import collect, known_records, markdown, write
from lbdet.sweep.run import Sweep, run_cell

LAYER = {"weights": 4, "bits": 4, "stored_bits": 14, "zeros": 0.5, "squared_error": 0.1}
GOOD = {"metrics.json": {"steps": 2, "voc07_map": 0.5}, "coverage.json": [LAYER], "latency.json": {"ms": 3.0}}


@pytest.fixture
def cell(config: Path, tmp_path: Path) -> tuple[Sweep, Cell]:
    """A finished cell of a sweep: its files, no model."""
    sweep, cell = Sweep(str(config), (), tmp_path / "sweep"), Cell("qat", Precision(4), 0)
    folder = sweep.run(cell).path
    folder.mkdir(parents=True)
    for name, content in GOOD.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.lbw").write_bytes(bytes(9))
    return sweep, cell


def test_a_record_tells_what_the_files_of_its_cell_tell(cell: tuple[Sweep, Cell]) -> None:
    (found,) = collect(cell[0], [cell[1]], {}, (), "").cells
    assert (found.state, found.bytes, found.steps, found.latency_ms) == ("done", 9, 2, 3.0)
    assert (found.bits_per_weight, found.zeros, found.squared_error) == (3.5, 0.5, 0.1)


def test_what_is_written_can_be_read(cell: tuple[Sweep, Cell]) -> None:
    found = collect(cell[0], [cell[1], Cell("qat", Precision(2), 0)], {}, (), "a command")
    write(found)
    assert read_sweep(cell[0].folder) == found
    assert {"sweep.csv", "sweep.md"} < {path.name for path in cell[0].folder.iterdir()}


def test_records_of_cells_that_a_call_does_not_touch_stay_as_they_are(cell: tuple[Sweep, Cell]) -> None:
    sweep, known = cell
    other = Cell("qat", Precision(3), 0)
    write(collect(sweep, [known, other], {other.name: "step 3: loss is nan"}, (), "first"))
    changed = Sweep(sweep.config, ("train.lr=0.5",), sweep.folder)
    before = known_records(sweep.folder)
    after = collect(changed, [Cell("qat", Precision(2), 0)], {}, before, "second")
    assert after.cells[1:] == tuple(before)
    assert "lr=0.5" not in (after.cells[1].command or "")
    assert (after.cells[2].state, after.cells[2].error) == ("failed", "step 3: loss is nan")


def test_a_failure_stays_one_until_the_cell_was_tried_again(cell: tuple[Sweep, Cell]) -> None:
    sweep, _ = cell
    lost = Cell("qat", Precision(3), 0)
    before = collect(sweep, [lost], {lost.name: "step 3: loss is nan"}, (), "").cells
    (waiting,) = collect(sweep, [lost], {}, before, "").cells
    (again,) = collect(sweep, [lost], {lost.name: "step 4: loss is nan"}, before, "").cells
    assert (waiting.state, waiting.error) == ("failed", "step 3: loss is nan")
    assert again.error == "step 4: loss is nan"


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "must be JSON, got maximum recursion"),
        (b"\xff", "must be JSON in UTF-8"),
        (b"7", "must be as a sweep leaves them, got something else"),
        (b'"x"', "must be as a sweep leaves them"),
        (b"{}", "must be as a sweep leaves them"),
        (b"[[]]", "must be as a sweep leaves them"),
    ],
)
def test_a_cell_with_a_damaged_file_has_failed_and_the_others_have_not(
    cell: tuple[Sweep, Cell], name: str, content: bytes, message: str
) -> None:
    sweep, good = cell
    bad = Cell("qat", Precision(3), 0)
    shutil.copytree(sweep.run(good).path, sweep.run(bad).path)
    (sweep.run(bad).path / name).write_bytes(content)
    first, second = collect(sweep, [good, bad], {}, (), "").cells
    assert (first.state, second.state) == ("done", "failed")
    assert second.error is not None
    assert re.search(message, second.error)
    assert len(second.error.splitlines()) == 1


def test_a_cell_that_is_there_already_is_looked_at(cell: tuple[Sweep, Cell]) -> None:
    sweep, known = cell
    run = sweep.run(known)
    run.start(dump_config(sweep.config_of(known)))
    (run.path / "model.safetensors").touch()
    assert run_cell(sweep, known) is None
    (run.path / "coverage.json").write_text("[]")
    assert "remove the folder to run the cell again" in str(run_cell(sweep, known))


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"cells": 3}', b'{"cells": [{"ratio": "x"}]}'],
)
def test_a_damaged_file_of_a_sweep_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(UserError, match=r"sweep\.json: ") as error:
        known_records(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def record(series: str, precision: str, seed: int, value: float | None, **other) -> points.Cell:
    facts = {"state": "done", "metrics": {"voc07_map": value}, "bytes": 1_000_000, "bits_per_weight": 3.2,
             "zeros": 0.1} | other  # fmt: skip
    name = f"{series}_{precision}_seed{seed}"
    return points.Cell(series=series, precision=precision, seed=seed, name=name, folder=Path(name), **facts)


def test_the_text_names_the_points_the_failures_and_what_is_missing() -> None:
    nan = {"state": "failed", "error": "step 3: loss is nan", "metrics": None}
    records = (
        record("float", "float", 0, 0.6), record("float", "float", 1, 0.64),
        record("qat", "W4", 0, 0.6), record("qat", "W4", 1, 0.63), record("qat", "W4", 2, None, **nan),
        record("qat semi", "W2", 0, 0.5, ratio=0.75), record("qat", "W3", 0, None, state="missing"),
    )  # fmt: skip
    text = markdown(
        Found(version=1, metric="voc07_map", metric_name="VOC 11-point mAP", cells=records, command="x")
    )
    assert (
        "| qat | W4 | 0.615 | 0.600 to 0.630, 2 of 3 seeds, 1 failed | -0.005, inside float's range | 1.00 |"
        in text
    )
    assert "| qat semi (ratio 0.75) | W2 | 0.500 | 1 of 2 seeds | -0.120, below float's range |" in text
    assert "* qat_W4_seed2: step 3: loss is nan" in text
    assert "Not run yet: qat_W3_seed0" in text
