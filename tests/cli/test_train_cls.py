"""`train_cls.py` and `eval_cls.py` as a user sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lbdet.cli import eval_cls, eval_det, train_cls, train_det, visualize

CONFIG = {
    "model": {"name": "resnet20_cifar"},
    "data": {"name": "npz", "train": ["train"], "val": ["test"], "augment": "cifar"},
    "quantizer": {
        "weight": {"format": "learned_levels"},
        "overrides": {"conv1": {"precision": "W8A8", "weight": {"format": "uniform"}}},
    },
    "schedule": {"target": "W2A2"},
    "train": {
        "max_steps": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.001, "warmup_steps": 0, "workers": 0,
        "calibration_images": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images to train on and eight to evaluate on, in three shades, sorted by class."""
    path = tmp_path_factory.mktemp("npz") / "shades.npz"
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 16), ("test", 8)):
        labels = np.sort(random.integers(0, 3, count)).astype(np.uint8)
        noise = random.integers(0, 40, (count, 32, 32, 3))
        arrays |= {
            f"x_{split}": (labels[:, None, None, None] * 80 + noise).astype(np.uint8),
            f"y_{split}": labels,
        }
    np.savez(path, classes=np.array(["dark", "grey", "light"]), **arrays)
    return path


@pytest.fixture
def config(tmp_path: Path, images: Path) -> Path:
    path = tmp_path / "shades.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": {**CONFIG["data"], "root": str(images)}}))
    return path


def test_a_run_leaves_its_files_and_is_evaluated_again_to_the_same_numbers(
    call: Callable, config: Path, tmp_path: Path
):
    run = tmp_path / "run"
    result = call(train_cls.main, "--config", config, "--output", run)
    assert (result.code, result.err) == (0, "")
    assert "activations calibrated on 8 images" in result.out
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"top1", "top5", "images", "precision", "steps", "seed", "model_bytes"} == metrics.keys()
    assert metrics["top5"] == 1.0
    assert not (run / "detections.json").exists()
    coverage = {layer["name"]: layer for layer in json.loads((run / "coverage.json").read_text())}
    assert (coverage["conv1"]["bits"], coverage["conv1"]["act_bits"], coverage["conv1"]["format"]) == (
        8,
        8,
        "uniform",
    )
    assert (coverage["fc"]["bits"], len(coverage["fc"]["levels"]), coverage["fc"]["act_bits"]) == (2, 4, 2)
    assert coverage["fc"]["act_scale"] > 0
    again = call(
        eval_cls.main, "--run", run, "--precision", "W2A2", "W4A8", "float", "--output", tmp_path / "e.json"
    )
    assert again.code == 0
    measured = json.loads((tmp_path / "e.json").read_text())
    assert measured[0]["top1"] == metrics["top1"]
    assert [m["precision"] for m in measured] == ["W2A2", "W4A8", "float"]
    assert (
        measured[0]["model_bytes"]
        == metrics["model_bytes"]
        < measured[1]["model_bytes"]
        < measured[2]["model_bytes"]
    )
    assert again.out.count("activations calibrated") == 1  # W2A2's ranges are the run's own
    (tmp_path / "photo.png").write_bytes(b"")
    drawn = call(
        visualize.main, "--run", run, "--images", tmp_path / "photo.png", "--output", tmp_path / "drawn"
    )
    assert drawn.err == "error: model.name: 'resnet20_cifar' is a classifier; use the tools *_cls.py\n"


def test_a_killed_and_resumed_run_has_the_same_weights(call: Callable, config: Path, tmp_path: Path):
    settings = ["train.max_steps=4", "train.checkpoint_steps=2", "train.ema=0.9"]
    assert call(train_cls.main, "--config", config, "--output", tmp_path / "a", "--set", *settings).code == 0
    assert call(train_cls.main, "--config", config, "--output", tmp_path / "b", "--set", *settings).code == 0
    whole = load_file(tmp_path / "a" / "model.safetensors")
    assert _equal(load_file(tmp_path / "b" / "model.safetensors"), whole)
    # a run that stopped at step 2 is one with that checkpoint and no results
    from lbdet.engine import train as loop

    class Killed(BaseException):
        pass

    update = loop._update

    def kill(*arguments):
        if arguments[-2] == 3:
            raise Killed
        return update(*arguments)

    loop._update = kill
    try:
        with pytest.raises(Killed):
            train_cls.main(["--config", str(config), "--output", str(tmp_path / "c"), "--set", *settings])
    finally:
        loop._update = update
    result = call(
        train_cls.main, "--config", config, "--output", tmp_path / "c", "--resume", "--set", *settings
    )
    assert "resumed at step 2/4" in result.out
    assert "activations calibrated" not in result.out
    assert _equal(load_file(tmp_path / "c" / "model.safetensors"), whole)


def _equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)


def test_no_training_still_calibrates_activations(call: Callable, config: Path, tmp_path: Path):
    settings = ["train.max_steps=0", "schedule.target=W8A8"]
    result = call(train_cls.main, "--config", config, "--output", tmp_path / "run", "--set", *settings)
    assert (result.code, result.err) == (0, "")
    assert result.out.count("activations calibrated on 8 images") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 0


def test_a_run_at_low_bits_is_the_start_of_another_and_a_float_run_its_teacher(
    call: Callable, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    for name, target in (("a", "W2A2"), ("float", "float")):
        settings = ("--set", f"schedule.target={target}")
        assert call(train_cls.main, "--config", config, "--output", tmp_path / name, *settings).code == 0
    low, high = (tmp_path / name / "model.safetensors" for name in ("a", "float"))
    for start, teacher in ((high, "float"), (low, high.parent), (low, high)):
        weights = f"model.weights={start}"
        output = tmp_path / f"b{len(list(tmp_path.iterdir()))}"
        guidance = f"guidance={{teacher: {teacher}, logits: 1}}"
        result = call(
            train_cls.main, "--config", config, "--output", output, "--set", weights, guidance,
            "schedule.target=W4A4", "train.checkpoint_steps=1",
        )  # fmt: skip
        assert (result.code, result.err) == (0, "")
        assert "tensors of quantizers are left out; they start anew" in caplog.text
        last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["loss"] == pytest.approx(last["classification"] + last["hint_logits"])


TEACHERS = {
    "{logits: 1, teacher: RUN}": "must be a float model, got RUN of W2A2, ",
    "{logits: 1, teacher: RUN/model.safetensors}": "a float model, got RUN/model.safetensors of W2A2, ",
    "{logits: 1, teacher: float}": "a float model, got RUN/model.safetensors of W2A2, ",
    "{logits: 1, teacher: flaot}": "must be 'float', a run or weights: flaot: weights must be ",
    "{boxes: 1}": "guidance.boxes: is for detectors, got resnet20_cifar; use logits or features",
}


@pytest.mark.parametrize("guidance", TEACHERS)
def test_what_cannot_teach_is_refused(call: Callable, config: Path, tmp_path: Path, guidance: str):
    run = str(tmp_path / "run")
    settings = ["schedule.target=W2A2", "train.max_steps=0"]
    assert call(train_cls.main, "--config", config, "--output", run, "--set", *settings).code == 0
    taught = [f"guidance={guidance.replace('RUN', run)}", f"model.weights={run}/model.safetensors"]
    result = call(train_cls.main, "--config", config, "--output", tmp_path / "taught", "--set", *taught)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert TEACHERS[guidance].replace("RUN", run) in result.err
    assert not (tmp_path / "taught").exists()


def test_a_teacher_of_another_architecture_is_refused(
    call: Callable, config: Path, finished_run: Path, tmp_path: Path
):
    guidance = f"guidance={{teacher: {finished_run}, logits: 1}}"
    result = call(train_cls.main, "--config", config, "--output", tmp_path / "run", "--set", guidance)
    assert result.code == 2
    assert "guidance.teacher: must be a resnet20_cifar of the same classes, got " in result.err
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "model.name=ssd_tiny": "data.name: a detector needs one of voc, coco, shapes, got 'npz' for 'ssd_tiny'",
    "model.name=resnet21": "got 'resnet21'; closest: 'resnet",
    "data.name=voc": "data.name: a classifier needs one of imagefolder, cifar10, cifar100, npz, "
    "tiny_imagenet, got 'voc' for 'resnet20_cifar'",
    "data.train=[train, test]": "data: 'npz' reads one split at a time, got ['train', 'test']; name one",
    "data.score_classes=[dark]": "data.score_classes: is for detection, got it with 'npz'; leave it out",
    "data.classes=[a, b]": "data.classes: must be those of the data set or null, got ['a', 'b']",
    "model.weights_backbone=x": "model.weights_backbone: is for detectors, got 'x'; use weights",
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_folder(
    call: Callable, config: Path, tmp_path: Path, setting: str
):
    result = call(train_cls.main, "--config", config, "--output", tmp_path / "run", "--set", setting)
    assert result.code == 2
    assert MISTAKES[setting] in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_each_tool_names_the_other(call: Callable, config: Path, finished_run: Path):
    result = call(train_det.main, "--config", config)
    assert (result.code, result.err) == (
        2,
        "error: model.name: 'resnet20_cifar' is a classifier; use the tools *_cls.py\n",
    )
    result = call(eval_cls.main, "--run", finished_run)
    assert (result.code, result.err) == (
        2,
        "error: model.name: 'ssd_tiny' is a detector; use the tools *_det.py\n",
    )
    assert call(eval_det.main, "--config", config).code == 2
