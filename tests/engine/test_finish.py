"""The end of a run: what is saved is what was evaluated, and metrics.json comes last."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lbdet.convert import quantize_model
from lbdet.data.records import spread_images
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.engine.evaluate import detect, evaluate
from lbdet.engine.finish import finish, recalibrate, summary
from lbdet.engine.run_folder import RunFolder
from lbdet.engine.task import DetectionTask
from lbdet.models.ssd_tiny import ssd_tiny

TASK = DetectionTask()


@pytest.fixture(scope="module")
def splits(devkit):
    return [read_voc(devkit, [f"2012:{split}"], SHAPE_CLASSES) for split in ("train", "val")]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.start("")
    return folder


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return quantize_model(ssd_tiny(len(SHAPE_CLASSES) + 1), "W3", keep_float=["backbone.stem.0"])[0]


def end_run(model, splits, run, recalibrate_images=0):
    facts = {"precision": "W3", "steps": 7}
    kept = ["backbone.stem.0"]
    return finish(model, TASK, *splits, run, "ssd_tiny", 4, 2, recalibrate_images, kept, facts)


def test_the_files_tell_what_was_evaluated(model, splits, run):
    metrics = end_run(model, splits, run, recalibrate_images=8)
    saved = load_file(run.model)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert json.loads((run.path / "metrics.json").read_text()) == metrics
    val = spread_images(splits[1], 4)
    direct = evaluate(model, val, None, 2).metrics
    assert metrics == {"precision": "W3", "steps": 7, "model_bytes": metrics["model_bytes"], **direct}
    found = detect(model, val, 2)
    written = json.loads((run.path / "detections.json").read_text())
    assert [row["image_id"] for row in written] == [
        record.id for record, one in zip(val.records, found, strict=True) for _ in one["scores"]
    ]
    scores = np.concatenate([one["scores"] for one in found])
    np.testing.assert_allclose([row["score"] for row in written], scores, atol=1e-5)
    coverage = {layer["name"]: layer for layer in json.loads((run.path / "coverage.json").read_text())}
    assert coverage["backbone.stem.0"]["bits"] is None
    assert coverage["backbone.stem.0"]["reason"] == "keep_float 'backbone.stem.0'"
    assert coverage["backbone.stage1.0"]["bits"] == 3


def test_fewer_bits_are_fewer_bytes(model, splits, run):
    bits3 = end_run(model, splits, run)["model_bytes"]
    whole = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert bits3 < whole / 3


def test_a_run_whose_evaluation_fails_is_not_finished(model, splits, run, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DetectionTask, "evaluate", fail)
    with pytest.raises(KeyboardInterrupt):
        end_run(model, splits, run)
    assert run.model.exists()
    assert not run.finished


def test_recalibration_on_no_images_reads_nothing(model, splits, capsys):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    recalibrate(model, TASK, spread_images(splits[0], 0), 0)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert capsys.readouterr().out == ""


def test_recalibrated_statistics_are_those_of_the_images(model, splits, capsys):
    recalibrate(model, TASK, splits[0], 12)
    assert capsys.readouterr().out == "batch norm recalibrated on 12 images\n"
    seen = []
    hook = model.backbone.stem[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    detect(model, splits[0], 12, workers=0)
    hook.remove()
    pixels = torch.cat(seen).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        model.backbone.stem[1].running_mean.double(), pixels.mean(1), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        model.backbone.stem[1].running_var.double(), pixels.var(1), rtol=1e-3, atol=1e-4
    )


def test_the_summary_is_one_line_and_knows_missing_numbers():
    metrics = {
        "precision": "W4", "voc07_map": 0.7034, "voc_area_map": None, "coco_map": 0.5,
        "scored_classes": ["a", "b"], "images": 9,
    }  # fmt: skip
    assert summary(TASK, metrics) == (
        "W4: VOC 11-point mAP 0.703, VOC area mAP -, COCO mAP 0.500 over 2 classes, 9 images"
    )
