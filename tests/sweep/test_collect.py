"""The summary of a sweep: means, spreads and the word about them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from lbdet.config import dump_config
from lbdet.errors import UserError
from lbdet.precision import Precision
from lbdet.sweep.cells import Cell
from lbdet.sweep.collect import collect, known_cells, markdown, summarize
from lbdet.sweep.run import Sweep, run_cell


def record(series: str, precision: str, seed: int, value: float | None, ratio: float | None = None, **other):
    bits = None if precision == "float" else int(precision[1])
    return {
        "name": f"{series}_{precision}_seed{seed}", "series": series, "mode": series.split()[0],
        "precision": precision, "weight_bits": bits, "act_bits": None, "seed": seed, "ratio": ratio,
        "state": "done", "error": None, "metrics": {"voc07_map": value}, "bytes": 1_000_000,
        "bits_per_weight": 3.2, "zeros": 0.1,
    } | other  # fmt: skip


def points(*records):
    return {(p["series"], p["precision"]): p for p in summarize(records, "voc07_map")}


def test_a_point_is_the_mean_over_seeds_with_its_range() -> None:
    found = points(*(record("qat", "W4", seed, value) for seed, value in ((2, 0.7), (0, 0.74), (1, 0.72))))
    point = found["qat", "W4"]
    assert point["seeds"] == [0, 1, 2]
    assert (point["mean"], point["lowest"], point["highest"]) == (pytest.approx(0.72), 0.7, 0.74)
    assert (point["against_float"], point["word"]) == (None, "")


@pytest.mark.parametrize(
    ("values", "floats", "word"),
    [
        ((0.72, 0.74), (0.75, 0.73), "inside the spread of the seeds"),
        ((0.70, 0.705), (0.75, 0.73), "outside the spread of the seeds"),
        ((0.70, 0.76), (0.75, 0.751), "inside the spread of the seeds"),
        ((0.72, 0.74), (0.73,), "one seed: no spread"),
        ((0.72,), (0.73, 0.74), "one seed: no spread"),
    ],
)
def test_a_plain_word_says_whether_a_difference_means_anything(values, floats, word) -> None:
    records = [record("qat", "W4", seed, value) for seed, value in enumerate(values)]
    records += [record("float", "float", seed, value) for seed, value in enumerate(floats)]
    point = points(*records)["qat", "W4"]
    assert point["word"] == word
    assert point["against_float"] == pytest.approx(sum(values) / len(values) - sum(floats) / len(floats))


def test_of_several_ratios_the_best_mean_stands_for_its_width() -> None:
    values = {0.6: (0.5, 0.6), 0.75: (0.7, 0.5), 0.9: (0.1, 0.2)}
    records = [record("qat semi", "W2", s, v, r) for r, vs in values.items() for s, v in enumerate(vs)]
    point = points(*records)["qat semi", "W2"]
    assert (point["ratio"], point["mean"]) == (0.75, pytest.approx(0.6))


def test_the_float_point_comes_first_and_widths_fall() -> None:
    records = [record("qat", f"W{bits}", 0, 0.5) for bits in (2, 5, 3)] + [record("float", "float", 0, 0.6)]
    assert [p["precision"] for p in summarize(records, "voc07_map")] == ["float", "W5", "W3", "W2"]


def test_cells_without_a_result_are_no_points() -> None:
    records = [
        record("qat", "W4", 0, 0.5),
        record("qat", "W4", 1, 0.9, state="failed"),
        record("qat", "W2", 0, None),
    ]
    assert [(p["precision"], p["seeds"]) for p in summarize(records, "voc07_map")] == [("W4", [0])]


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
    (found,) = collect(cell[0], [cell[1]], {}, "")["cells"]
    assert (found["state"], found["bytes"], found["steps"], found["latency_ms"]) == ("done", 9, 2, 3.0)
    assert (found["bits_per_weight"], found["zeros"], found["squared_error"]) == (3.5, 0.5, 0.1)


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
    first, second = collect(sweep, [good, bad], {}, "")["cells"]
    assert (first["state"], second["state"]) == ("done", "failed")
    assert re.search(message, second["error"])
    assert len(second["error"].splitlines()) == 1


def test_a_cell_that_is_there_already_is_looked_at(cell: tuple[Sweep, Cell]) -> None:
    sweep, known = cell
    run = sweep.run(known)
    run.start(dump_config(sweep.config_of(known)))
    (run.path / "model.safetensors").touch()
    assert run_cell(sweep, known) is None
    (run.path / "coverage.json").write_text("[]")
    assert "remove the folder to run the cell again" in str(run_cell(sweep, known))


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"cells": 3}'])
def test_a_damaged_file_of_a_sweep_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(UserError, match=r"sweep\.json: must be ") as error:
        known_cells(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_the_text_names_the_points_the_failures_and_what_is_missing() -> None:
    records = [record("float", "float", 0, 0.6), record("qat semi", "W4", 0, 0.5, 0.75)]
    lost = [
        record("qat", "W2", 0, None, state="failed", error="step 3: loss is nan"),
        record("qat", "W3", 0, None, state="missing"),
    ]
    content = {
        "metric": "voc07_map", "metric_name": "VOC 11-point mAP", "cells": records + lost,
        "command": "python tools/sweep_bits.py", "summary": summarize(records, "voc07_map"),
    }  # fmt: skip
    text = markdown(content)
    assert (
        "| qat semi (ratio 0.75) | W4 | 0.500 | one seed | -0.100, one seed: no spread | 1.00 | 3.20 | 10% |"
        in text
    )
    assert "* qat_W2_seed0: step 3: loss is nan" in text
    assert "Not run yet: qat_W3_seed0" in text
