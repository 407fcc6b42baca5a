"""`benchmark.py` as its user runs it."""

from __future__ import annotations

import json
import re

import pytest

from lbdet.cli import benchmark, train_det


@pytest.fixture(scope="session")
def w4a8_run(tmp_path_factory, devkit):
    """The folder of a run without training, inputs calibrated; not to be changed."""
    from conftest import write_config

    folder = tmp_path_factory.mktemp("w4a8")
    path, run = write_config(folder, devkit), folder / "run"
    settings = ("schedule.target=W4A8", "train.max_steps=0", "train.calibration_images=4")
    assert train_det.main(["--config", str(path), "--output", str(run), "--set", *settings]) == 0
    return run


def test_two_engines_leave_a_report_and_a_table(w4a8_run, tmp_path, call):
    out = tmp_path / "new" / "folder"
    found = call(
        benchmark.main, "--run", w4a8_run, "--engines", "openvino-int8", "onnxruntime", "--images", 2,
        "--repeats", 3, "--batch", 2, "--threads", 1, "--output", out,
    )  # fmt: skip
    assert found.code == 0, found.err
    report = json.loads((out / "benchmark.json").read_text())
    assert report["options"] == {"threads": 1, "repeats": 3, "warmup": 2, "batch": 2, "images": 2}
    assert report["base"] == "onnxruntime", "the first in the order of the table"
    assert report["machine"]["cpu"]
    assert report["versions"]["openvino"]
    assert report["packed_size"] > 1000
    assert set(report["engines"]) == {"onnxruntime", "openvino-int8"}
    for name, facts in report["engines"].items():
        assert set(facts["stages"]) == {"end_to_end", "prepare", "network", "batch", "post"}, name
        assert facts["peak_memory"] > facts["file_size"] > 1000
        for stage, summary in facts["stages"].items():
            assert summary["samples"] == (3 if stage == "batch" else 6)
            assert (
                0 < summary["p05"] <= summary["p25"] <= summary["median"] <= summary["p75"] <= summary["p95"]
            )
            assert len(summary["round_medians"]) == 3
    int8 = report["engines"]["openvino-int8"]
    assert int8["int8_layers"] > 0
    assert int8["float_layers"] == []
    ours, base = int8["stages"]["end_to_end"], report["engines"]["onnxruntime"]["stages"]["end_to_end"]
    ratios = sorted(b / o for b, o in zip(base["round_medians"], ours["round_medians"], strict=True))
    assert ours["speedup"]["median"] == pytest.approx(ratios[1])
    shown = (out / "benchmark.md").read_text()
    assert shown.strip() in found.out
    assert f"{ours['speedup']['median']:.2f}" in shown


def test_without_any_engine_there_is_one_line(w4a8_run, tmp_path, call, monkeypatch):
    monkeypatch.setattr(
        "lbdet.deploy.benchmark.find_spec", lambda name: None if name == "onnxruntime" else object()
    )
    found = call(benchmark.main, "--run", w4a8_run, "--engines", "onnxruntime", "--output", tmp_path / "out")
    assert found.code == 2
    assert "none can be run here, got onnxruntime (onnxruntime is not installed)" in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "torhc"), "--engines: must be of torch, .*, got 'torhc'; closest: 'torch'"),
        (("--images", "0"), "--images: must be at least 1, got 0"),
        (("--threads", "0"), "--threads: must be at least 1, got 0"),
        (("--warmup", "-1"), "--warmup: must be at least 0, got -1"),
        (("--calibration-images", "2"), "--calibration-images: is for runs of weight bits without"),
    ],
)
def test_what_cannot_be_is_one_line(w4a8_run, tmp_path, call, arguments, message):
    found = call(benchmark.main, "--run", w4a8_run, "--output", tmp_path / "out", *arguments)
    assert found.code == 2
    assert len(found.err.strip().splitlines()) == 1
    assert re.search(message, found.err)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, call):
    found = call(benchmark.main, "--run", tmp_path)
    assert found.code == 2
    assert "must be the folder of a run" in found.err


@pytest.mark.slow
def test_every_engine_that_is_installed_runs(finished_run, tmp_path, call):
    found = call(
        benchmark.main, "--run", finished_run, "--calibration-images", 4, "--images", 1, "--repeats", 1,
        "--output", tmp_path,
    )  # fmt: skip
    assert found.code == 0, found.err
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["base"] == "torch"
    for name, facts in report["engines"].items():
        assert "stages" in facts or "not installed" in facts["skipped"] or "bf16" in facts["skipped"], name
    assert report["engines"]["torch"]["stages"]["end_to_end"]["speedup"]["median"] == 1.0
