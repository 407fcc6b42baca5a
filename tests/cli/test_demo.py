"""`lbdet demo`."""

from __future__ import annotations

import pytest

from lbdet.cli import demo


def metrics(bytes_: int, voc07: float) -> dict:
    return {"model_bytes": bytes_, "voc07_map": voc07, "voc_area_map": 0.5, "coco_map": 0.25}


def test_the_table_has_a_line_a_precision_and_sizes_relative_to_the_first():
    lines = demo.table({"float": metrics(1_000_000, 0.7654), "W2": metrics(80_000, 0.7)}).splitlines()
    assert " ".join(lines[0].split()) == "precision VOC 11-point mAP VOC area mAP COCO mAP bytes smaller"
    assert lines[1].split() == ["float", "0.765", "0.500", "0.250", "1,000,000", "1.0x"]
    assert lines[2].split() == ["W2", "0.700", "0.500", "0.250", "80,000", "12.5x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "metrics.json: must be JSON, got maximum recursion"),
        (b"\xff", "metrics.json: must be JSON in UTF-8"),
        (b"[]", "each metrics.json must be what a run leaves, got something else; remove the folder"),
        (b'{"model_bytes": "x"}', "each metrics.json must be what a run leaves"),
    ],
)
def test_damaged_metrics_of_an_earlier_call_are_told_in_one_line(
    call, tmp_path, monkeypatch, content, message
):
    monkeypatch.setattr(demo, "train_run", lambda *arguments, **named: None)
    monkeypatch.setattr(demo, "visualize", lambda *arguments: None)
    for name in ("float", "W4", "W2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_bytes(content)
    (tmp_path / "shapes/VOC2012/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "shapes/VOC2012/ImageSets/Main/val.txt").touch()
    result = call(demo.main, "--output", tmp_path)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert message in line


@pytest.mark.slow
def test_the_demo_leaves_three_runs_and_pictures_and_a_second_call_only_reports(call, tmp_path):
    arguments = ["--output", tmp_path / "demo", "--set", "train.max_steps=2", "eval.max_images=8"]
    first = call(demo.main, *arguments)
    assert first.code == 0
    for name in ("float", "W4", "W2"):
        assert (tmp_path / "demo" / name / "metrics.json").exists()
    for name in ("W4", "W2"):
        assert len(list((tmp_path / "demo" / f"pictures_{name}_against_float").glob("*.png"))) == 6
    second = call(demo.main, *arguments)
    assert second.code == 0
    assert second.out.count("is finished already") == 3
    assert second.out.splitlines()[-5:] == first.out.splitlines()[-5:]
