"""`report.py`: what it writes where, and which mistakes it tells before it writes anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sweeps import cell_entry, write_sweep

from lbdet.cli import report
from lbdet.data.shapes import render_shapes

NAMES = ["report.html", "sweep.png", "sweep.svg"]


@pytest.fixture
def sweep(tmp_path: Path, devkit: Path) -> Path:
    return write_sweep(tmp_path / "sweep", devkit)


@pytest.fixture
def rebuild(call: Callable, sweep: Path) -> Callable:
    return lambda *options, folders=(sweep,): call(report.main, "--sweep", *folders, *options)


def written(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != "sweep.json")


def test_the_curve_and_the_page_are_written_into_the_sweep_and_rebuilt_byte_for_byte(
    rebuild: Callable, sweep: Path
) -> None:
    result = rebuild()
    assert (result.code, result.err) == (0, "")
    assert written(sweep) == NAMES
    assert [line.split(":")[0] for line in result.out.splitlines()] == [
        str(sweep / name) for name in ("sweep.png", "sweep.svg", "report.html")
    ]
    before = [(sweep / name).read_bytes() for name in NAMES]
    assert before[0].startswith(b"<!doctype html>")
    assert Image.open(sweep / "sweep.png").width == 1600
    assert b"<h1>ssd_<wbr>tiny on devkit</h1>" in before[0]
    for name in NAMES:
        (sweep / name).write_text("old")
    assert rebuild().code == 0
    assert [(sweep / name).read_bytes() for name in NAMES] == before


def test_photographs_and_boxes_are_as_many_as_asked_for(rebuild: Callable, sweep: Path) -> None:
    def counts(*options: object) -> tuple[int, int]:
        assert rebuild(*options).code == 0
        text = (sweep / "report.html").read_text()
        data = json.loads(text.split('id="data">')[1].split("</script>")[0])
        return text.count("<img "), sum(len(rows) for w in data["widths"] for rows in w["boxes"] or [])

    assert counts()[0] == 6  # all that there are
    assert counts("--photos", 2)[0] == 2
    assert counts("--photos", 0) == (0, 0)
    assert counts("--score", 1)[1] == 0 < counts("--score", 0.9)[1] < counts("--score", 0.3)[1]


def test_the_page_goes_to_the_output_and_the_curve_beside_it(
    rebuild: Callable, sweep: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    assert rebuild("--output", tmp_path / "site/w4.html").code == 0
    assert written(tmp_path / "site") == ["w4.html", "w4.png", "w4.svg"]
    assert written(sweep) == []


def test_several_sweeps_are_in_one_report(
    rebuild: Callable, sweep: Path, tmp_path: Path, devkit: Path
) -> None:
    other = write_sweep(tmp_path / "other", devkit, [cell_entry("qat", "W3", 0)])
    assert rebuild(folders=(sweep, other)).code == 0
    text = (sweep / "report.html").read_text()
    assert "<h1>sweep and other</h1>" in text
    assert "other: qat" in text
    assert "sweep: qat" in text
    assert written(other) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("2012:val", "2012:train"), "config.yaml: data.val: must be ['2012:val'] like that of "),
        (
            ("seed: 0", "seed: 0\neval: {max_images: 2}"),
            "config.yaml: eval.max_images: must be None like that",
        ),
        (("classes: shapes", "classes: [a]"), "config.yaml: data.classes: must be 'shapes' like that of "),
    ],
)
def test_sweeps_of_different_data_are_not_joined(
    rebuild: Callable, sweep: Path, tmp_path: Path, devkit: Path, change: tuple[str, str], message: str
) -> None:
    other = write_sweep(tmp_path / "other", devkit, [cell_entry("float", "float", 0)])
    file = other / "cells/float_float_seed0/config.yaml"
    file.write_text(file.read_text().replace(*change))
    result = rebuild(folders=(sweep, other))
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert written(sweep) == []


def test_sweeps_that_were_trained_on_different_data_are_joined(
    rebuild: Callable, sweep: Path, tmp_path: Path, devkit: Path
) -> None:
    other = write_sweep(tmp_path / "other", devkit, [cell_entry("float", "float", 0)])
    file = other / "cells/float_float_seed0/config.yaml"
    file.write_text(file.read_text().replace("2012:train", "2012:val"))
    assert rebuild("--photos", 0, folders=(sweep, other)).code == 0


def test_only_photographs_that_were_evaluated_are_shown(rebuild: Callable, sweep: Path) -> None:
    config = sweep / "cells/float_float_seed0/config.yaml"
    config.write_text(config.read_text() + "eval: {max_images: 2}\n")
    assert rebuild().code == 0
    text = (sweep / "report.html").read_text()
    assert [f"val_0000{k}" in text for k in range(6)] == [True, False, False, False, False, True]


def test_photographs_are_those_of_the_first_finished_cell_where_there_is_no_float(
    rebuild: Callable, tmp_path: Path, devkit: Path
) -> None:
    entries = [cell_entry("float", "float", 0, state="failed"), cell_entry("qat", "W4", 0)]
    folder = write_sweep(tmp_path / "s", devkit, entries)
    assert rebuild(folders=(folder,)).code == 0
    assert (folder / "report.html").read_text().count("<img ") == 6


def test_a_sweep_without_a_finished_cell_is_reported_all_the_same(
    rebuild: Callable, tmp_path: Path, devkit: Path
) -> None:
    folder = write_sweep(
        tmp_path / "s", devkit, [cell_entry("qat", "W4", 0, state="failed", error="out of luck")]
    )
    assert rebuild(folders=(folder,)).code == 0
    assert "out of luck" in (folder / "report.html").read_text()


def test_a_classifiers_sweep_is_reported_without_photographs(
    call: Callable, tmp_path: Path, devkit: Path
) -> None:
    entry = cell_entry("float", "float", 0, metrics={"top1": 0.9, "voc07_map": 0.9})
    folder = write_sweep(tmp_path / "s", devkit, [entry], metric="top1", metric_name="top-1")
    for name in ("a", "b"):
        (tmp_path / "images/val" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "images/val" / name / "0.png")
    config = folder / "cells/float_float_seed0/config.yaml"
    root = f"{{name: imagefolder, root: {tmp_path / 'images'}, train: [val], val: [val]}}"
    config.write_text(f"model: {{name: resnet18}}\ndata: {root}\nschedule: {{target: float}}\n")
    result = call(report.main, "--sweep", folder)
    assert (result.code, result.err) == (0, "")
    assert "<img " not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--photos", -1], "--photos: must not be negative, got -1"),
        (["--score", 1.5], "--score: must lie in [0, 1], got 1.5"),
        (["--score", "nan"], "--score: must lie in [0, 1], got nan"),
        (
            ["--output", "nowhere/x.html"],
            "--output: must be a .html file in a folder that exists, got nowhere/x",
        ),
        (["--output", "x.png"], "--output: must be a .html file in a folder that exists, got x.png"),
    ],
)
def test_an_option_out_of_range_is_told(rebuild: Callable, sweep: Path, options: list, message: str) -> None:
    result = rebuild(*options)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}")
    assert written(sweep) == []


def spoil_photo(sweep: Path, devkit: Path) -> None:
    (devkit / "VOC2012/JPEGImages/val_00000.jpg").write_bytes(b"\xff\xd8 and no more")


def spoil_detections(sweep: Path, devkit: Path) -> None:
    (sweep / "cells/qat_W4_seed0/detections.json").write_text('[{"image_id": "val_00')


def remove_detections(sweep: Path, devkit: Path) -> None:
    (sweep / "cells/ptq_W2_seed0/detections.json").unlink()


def remove_sweep(sweep: Path, devkit: Path) -> None:
    (sweep / "sweep.json").unlink()


def remove_config(sweep: Path, devkit: Path) -> None:
    (sweep / "cells/float_float_seed0/config.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_photo, "val_00000.jpg: must be a whole JPEG or PNG image, got "),
        (spoil_detections, "cells/qat_W4_seed0/detections.json: must be JSON, got "),
        (
            remove_detections,
            "cells/ptq_W2_seed0/detections.json: cannot be read, got No such file or directory",
        ),
        (remove_sweep, "sweep: must be the folder of a sweep, got no sweep.json in it"),
        (remove_config, "cells/float_float_seed0/config.yaml"),
        (lambda _, devkit: shutil.rmtree(devkit), "--photos 0 leaves the photographs out"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_told_in_one_line(
    call: Callable, tmp_path: Path, spoil: Callable, message: str
) -> None:
    devkit = tmp_path / "devkit"
    render_shapes(devkit, train=1, val=2, size=(96, 80))
    sweep = write_sweep(tmp_path / "sweep", devkit)
    spoil(sweep, devkit)
    result = call(report.main, "--sweep", sweep)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert [name for name in written(sweep) if name in NAMES] == []


def test_without_photographs_the_data_set_is_not_needed(call: Callable, tmp_path: Path) -> None:
    devkit = tmp_path / "devkit"
    render_shapes(devkit, train=1, val=2, size=(96, 80))
    sweep = write_sweep(tmp_path / "sweep", devkit)
    shutil.rmtree(devkit)
    assert call(report.main, "--sweep", sweep, "--photos", 0).code == 0
    assert written(sweep) == NAMES
