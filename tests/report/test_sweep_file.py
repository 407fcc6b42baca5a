"""Reading sweep.json: what it says is kept, what it lacks is None, what is wrong is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweeps import cell_entry, metrics_of, write_sweep

from lbdet.errors import UserError
from lbdet.report.sweep_file import join_sweeps, read_sweep, sweep_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, devkit: Path) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "here", devkit)


def rewrite(path: Path, **changes: object) -> Path:
    """Write a sweep.json of one cell with changes at its top level."""
    cells = [cell_entry("qat", "W4", 0)]
    content = {"version": 1, "metric": "voc07_map", "metric_name": "m", "cells": cells}
    path.mkdir(exist_ok=True)
    (path / "sweep.json").write_text(json.dumps(content | changes))
    return path


def test_cells_are_as_they_stand_in_the_file(folder: Path) -> None:
    written, sweep = json.loads((folder / "sweep.json").read_text()), read_sweep(folder)
    for entry, cell in zip(written["cells"], sweep.cells, strict=True):
        assert cell.folder == folder / entry["folder"]
        for key in entry.keys() - {"folder"}:
            assert getattr(cell, key) == entry[key]
    assert (sweep.command, sweep.metric, sweep.metric_name) == (
        written["command"], "voc07_map", "VOC 11-point mAP",
    )  # fmt: skip


def test_the_cells_of_a_point_are_its_finished_ones_the_lowest_seed_first(tmp_path: Path) -> None:
    cells = [cell_entry("qat", "W4", seed) for seed in (2, 0, 1)]
    cells += [cell_entry("qat", "W4", 3, state="failed"), cell_entry("ptq", "W4", 5)]
    cells += [cell_entry("qat", "W4", 4, ratio=0.5, metrics=metrics_of(0.1)), cell_entry("qat", "W2", 6)]
    sweep = read_sweep(rewrite(tmp_path, cells=cells))
    point = next(point for point in sweep.summary if point.key == (0, "qat", "W4", None))
    assert [cell.seed for cell in point.cells] == [0, 1, 2]
    assert sweep.float_point is None


def test_what_is_written_is_what_was_read_with_a_summary_beside_it(folder: Path) -> None:
    sweep, written = read_sweep(folder), json.loads((folder / "sweep.json").read_text())
    again = json.loads(sweep_text(sweep))
    assert again["cells"] == written["cells"]
    point = next(p for p in again["summary"] if (p["series"], p["precision"]) == ("qat", "W4"))
    assert (point["seeds"], point["place"], point["planned"], point["failed"]) == ([0, 1], "inside", 2, 0)
    assert {"cells", "sweep"}.isdisjoint(point)


def test_a_file_of_before_is_read_and_its_summary_made_again(tmp_path: Path) -> None:
    old = {"series": "qat", "precision": "W4", "mean": 0.1, "word": "inside the spread of the seeds"}
    cells = [cell_entry("float", "float", seed) for seed in (0, 1)]
    cells.append(cell_entry("qat", "W4", 0, mode="qat", bytes_kind="packed files, batch norm folded"))
    _, point = read_sweep(rewrite(tmp_path, cells=cells, summary=[old])).summary
    assert (point.mean, point.place) == (pytest.approx(0.749), "below")


def test_the_reference_is_the_float_series_of_the_first_sweep(folder: Path, tmp_path: Path) -> None:
    float_cells = [cell_entry("float", "float", 0, state="failed"), cell_entry("qat", "W4", 0)]
    unfinished = read_sweep(rewrite(tmp_path / "a", cells=float_cells))
    assert unfinished.float_point is None
    both = join_sweeps([unfinished, read_sweep(folder)])
    assert both.float_point is None
    point = join_sweeps([read_sweep(folder), unfinished]).float_point
    assert point is not None
    assert (point.series, point.seeds) == ("here: float", (0, 1))


def test_missing_and_unknown_values_do_no_harm(tmp_path: Path) -> None:
    cell = {
        "name": "a",
        "folder": "cells/a",
        "series": "qat",
        "precision": "W4",
        "state": "done",
        "colour": 3,
    }
    (tmp_path / "sweep.json").write_text(
        json.dumps({"version": 1, "metric": "voc07_map", "metric_name": "m",
                    "cells": [cell, cell | {"metrics": {"voc07_map": float("nan")}}]})
    )  # fmt: skip
    sweep = read_sweep(tmp_path)
    assert sweep.cells[0].metrics is sweep.cells[0].bytes is None
    assert sweep.summary == ()


def test_several_sweeps_carry_their_folders_names_and_one_does_not(folder: Path, tmp_path: Path) -> None:
    one, other = read_sweep(folder), read_sweep(rewrite(tmp_path / "there"))
    assert join_sweeps([one]) == one
    both = join_sweeps([one, other])
    assert [p.series for p in both.summary] == [f"here: {p.series}" for p in one.summary] + ["there: qat"]
    assert [p.against_float for p in both.summary] == [p.against_float for p in one.summary] + [None]
    assert [c.name for c in both.cells[-2:]] == ["here/ptq_W4_seed0", "there/qat_W4_seed0"]
    assert [p.is_float for p in both.summary] == [p.series == "float" for p in one.summary] + [False]
    assert [len(point.cells) for point in both.summary] == [2, 1, 1, 1, 2, 1, 1, 1]


def test_sweeps_in_folders_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    twins = join_sweeps([read_sweep(rewrite(tmp_path / name / "there")) for name in "ab"])
    assert [p.series for p in twins.summary] == [f"{tmp_path}/{name}/there: qat" for name in "ab"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "sweep.json: version: input should be 1, got 2"),
        ({"cells": None}, "sweep.json: cells: input should be a valid tuple, got None"),
        ({"metric": ["x"]}, "sweep.json: metric: input should be a valid string, got ['x']"),
        ({"cells": [{"name": "a"}]}, "sweep.json: cells.0.series: field required, got {'name': 'a'}"),
        (
            {"cells": [cell_entry("qat", "W4", 0, ratio="x")]},
            "sweep.json: cells.0.ratio: input should be a valid number, unable to parse string as a number,",
        ),
    ],
)
def test_a_file_that_is_not_a_sweep_is_told(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_sweep(rewrite(tmp_path, **changes))
    assert str(tmp_path / message) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "sweep.json: must be JSON, got "), ("[]", "sweep.json: top level: "), ("\ud800", "must be JSON")],
)
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=message):
        read_sweep(tmp_path)


def test_a_folder_without_a_sweep_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be the folder of a sweep, got no sweep.json in it"):
        read_sweep(tmp_path)


def test_sweeps_of_different_metrics_cannot_be_joined(folder: Path, tmp_path: Path) -> None:
    other = read_sweep(rewrite(tmp_path / "o", metric="top1"))
    with pytest.raises(
        UserError, match=r"sweep.json: metric: must be 'voc07_map' like that of .*, got 'top1'"
    ):
        join_sweeps([read_sweep(folder), other])


def test_a_folder_cannot_be_joined_with_itself(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--sweep: folders must be different, got .*here twice"):
        join_sweeps([read_sweep(folder), read_sweep(folder / ".." / "here")])
