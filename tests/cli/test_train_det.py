"""`train_det.py` as a user sees it: the files of a run, exit codes, a clear message for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import lbdet.engine.train as loop
from lbdet.cli import train_det
from lbdet.config import load_config

FILES = {
    "checkpoint.pt", "config.yaml", "coverage.json", "detections.json", "manifest.json", "metrics.json",
    "metrics.jsonl",
    "model.safetensors",
}  # fmt: skip


@pytest.fixture
def own_devkit(devkit, tmp_path) -> Path:
    """A copy of the devkit that a test may damage."""
    return shutil.copytree(devkit, tmp_path / "own")


def annotation(devkit: Path, split: str = "train") -> Path:
    return devkit / f"VOC2012/Annotations/{split}_00000.xml"


def test_a_run_leaves_all_its_files_and_each_can_be_read(train, tmp_path):
    result = train()
    assert result.code == 0
    assert result.err == ""
    run = tmp_path / "run"
    shown = {"tensorboard"} if find_spec("tensorboard") else set()
    assert {file.name for file in run.iterdir()} == FILES | shown
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["precision"], metrics["steps"], metrics["seed"], metrics["images"]) == ("W4", 2, 0, 4)
    assert 0 <= metrics["voc07_map"] <= 1
    assert metrics["coco"].keys() == {"ap", "ap50", "ap75"}
    assert metrics["per_class"].keys() == {"disc", "square", "triangle", "star", "ring", "cross"}
    coverage = json.loads((run / "coverage.json").read_text())
    assert all(layer["bits"] == 4 and layer["format"] == "lbw" for layer in coverage)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2]
    assert log[0].keys() >= {"loss", "classification", "bbox_regression", "lr"}
    with safe_open(run / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"])[0] == "disc"
        assert file.metadata()["architecture"] == "ssd_tiny"
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 2
    for detection in json.loads((run / "detections.json").read_text()):
        assert detection.keys() == {"image_id", "category_id", "bbox", "score"}
    assert load_config(run / "config.yaml").train.max_steps == 2


def test_the_config_of_a_run_repeats_it_bit_for_bit(train, call, tmp_path):
    assert train("seed=3").code == 0
    again = call(train_det.main, "--config", tmp_path / "run/config.yaml", "--output", tmp_path / "again")
    assert again.code == 0
    for name in ("config.yaml", "metrics.json", "metrics.jsonl"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "run" / name).read_text()
    assert same_tensors(tmp_path / "run", tmp_path / "again")


def test_the_seed_matters(train, tmp_path):
    train("seed=0", output="a")
    train("seed=1", output="b")
    assert not same_tensors(tmp_path / "a", tmp_path / "b")


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.optimizer=adamw", "train.ema=0.9"],
        ["train.optimizer=sgd", "train.workers=1", "train.clip_norm=1"],
        ["train.optimizer=sgd", "train.ema=0.9", "schedule.target=float", "train.recalibrate_bn=4"],
        ["train.optimizer=adamw", "train.workers=1", "model.batch_norm=frozen", "data.augment=ssd"],
    ],
)
def test_an_interrupted_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    train, tmp_path, monkeypatch, settings
):
    settings = [*settings, "train.max_steps=6", "train.batch_size=2", "train.accumulate=2", "train.epochs=9"]
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    assert train(*settings, output="whole").code == 0
    with monkeypatch.context() as patch:
        update = loop._update

        def stop_at_step_2(*arguments):
            if arguments[-2] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*arguments)

        patch.setattr(loop, "_update", stop_at_step_2)
        stopped = train(*settings, output="parts")
    assert stopped.code == 143
    assert "interrupted at step 3, saved" in stopped.err
    assert not (tmp_path / "parts/metrics.json").exists()
    resumed = train(*settings, output="parts", resume=True)
    assert resumed.code == 0
    assert "resumed at step 3/6" in resumed.out
    assert same_tensors(tmp_path / "whole", tmp_path / "parts")
    for name in ("metrics.jsonl", "metrics.json"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert len((tmp_path / "parts/metrics.jsonl").read_text().splitlines()) == 6


def test_a_crash_between_checkpoints_is_resumed_from_the_last_one(train, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    settings = ["train.max_steps=4", "train.checkpoint_steps=2"]
    train(*settings, output="whole")
    for crash_at in (1, 3):  # before the first checkpoint, and after it
        with monkeypatch.context() as patch:
            update = loop._update

            def crash(*arguments, update=update, crash_at=crash_at):
                if arguments[-2] == crash_at:
                    raise MemoryError
                return update(*arguments)

            patch.setattr(loop, "_update", crash)
            with pytest.raises(MemoryError):
                train(*settings, output=f"parts{crash_at}")
        assert train(*settings, output=f"parts{crash_at}", resume=True).code == 0
        assert same_tensors(tmp_path / "whole", tmp_path / f"parts{crash_at}")
        logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", f"parts{crash_at}")]
        assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_saves_a_checkpoint_that_resumes(config, tmp_path, call, signum, code):
    run = tmp_path / "run"
    settings = ["train.max_steps=60", "train.checkpoint_steps=1", "train.epochs=99", "train.workers=1"]
    arguments = ["--config", str(config), "--output", str(run), "--set", *settings]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, str(root / "tools/train_det.py"), *arguments],
        cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signum)  # the worker gets it too, as from Ctrl-C or a batch system
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "saved; continue with --resume" in err
    assert "Traceback" not in err
    assert 0 < torch.load(run / "checkpoint.pt", weights_only=True)["step"] < 60
    assert call(train_det.main, *arguments, "--resume").code == 0


def test_resuming_a_finished_run_does_nothing(train, tmp_path):
    train()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    result = train(resume=True)
    assert result.code == 0
    assert "is finished already; nothing to do" in result.out
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()} == before


def test_resuming_where_there_is_no_run_starts_one(train, tmp_path):
    assert train(resume=True).code == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 2


def test_no_steps_evaluate_the_weights_as_they_are(train, tmp_path, finished_run):
    weights = f"model.weights={finished_run / 'model.safetensors'}"
    assert train("train.max_steps=0", weights).code == 0
    assert same_tensors(tmp_path / "run", finished_run)
    ours, theirs = (
        json.loads((run / "metrics.json").read_text()) for run in (tmp_path / "run", finished_run)
    )
    assert ours | {"steps": 10} == theirs


def test_amp_trains_and_tells_finite_losses(train, tmp_path):
    assert train("train.amp=true").code == 0
    log = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    train(output="exact")
    exact = json.loads((tmp_path / "exact/metrics.jsonl").read_text())
    assert log["loss"] != exact["loss"]
    assert log["loss"] == pytest.approx(exact["loss"], rel=0.1)


MISTAKES = {
    "quantizer.keep_float=[backbone.stem1]":
        "keep_float: pattern 'backbone.stem1' matches none of the 18 layers; closest: 'backbone.stem.0'",
    "quantizer.overrides={nothing*: {precision: W2}}": "pattern 'nothing*' matches none of the 18 layers",
    "data.root=/nowhere": "/nowhere: data set does not exist; see datasets/README.md",
    "data.root=/nowhere/voc_subset":
        "/nowhere/voc_subset: data set does not exist; make it with tools/prepare_voc_subset.py",
    "data.val=[2012:test]": "split '2012:test': test.txt must be in",
    "data.classes=[disc]": "got 'square'; add it to classes or set other_classes: ignore",
    "data.score_classes=[dics]": "data.score_classes: 'dics' is none of the 6 classes; closest: 'disc'",
    "data.augment=flop": "error: data.augment: must be one of none, flip, ",
    "model.name=ssd_tinny": "got 'ssd_tinny'; closest: 'ssd_tiny'",
    "model.image_size=320": "image_size: the input size of an SSD is fixed, got 320",
    "model.weights=/nowhere.pth": "/nowhere.pth: weights must be a file, got no such file; give its path",
    "model.weights=/nowhere/ssdlite320_mobilenet_v3_large_coco_v1_int8.pth":
        "weights must be a file, got no such file; make it with tools/prepare_weights.py",
    "schedule.name=progresive": "got 'progresive'; closest: 'progressive'",
    "train.batch_size=1":
        "train.batch_size: must be at least 2 for an SSD with model.batch_norm: train, got 1",
    "schedule.target=W8": "schedule.target: format 'lbw' has no 8-bit weights, got W8; it has W2 to W6",
    "train.epochs": "--set: must be like train.epochs=1, got 'train.epochs'",
}  # fmt: skip


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistake_in_the_config_is_told_before_anything_is_written(train, tmp_path, setting):
    result = train(setting)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert MISTAKES[setting] in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("root", ["voc_subset", "voc_subset/"])
def test_a_set_made_of_an_official_one_is_not_downloaded_over(call, config, tmp_path, monkeypatch, root):
    monkeypatch.setattr("lbdet.build.data.download_voc", lambda *_: pytest.fail("downloads"))
    result = call(
        train_det.main, "--config", config, "--output", tmp_path / "run", "--download",
        "--set", f"data.root={tmp_path}/{root}",
    )  # fmt: skip
    assert result.err == (
        f"error: --download: is for official data sets, got data.root {tmp_path}/{root}; "
        "make it with tools/prepare_voc_subset.py\n"
    )


def test_misspelt_keys_are_told_all_at_once(train, tmp_path):
    result = train("train.epoch=3", "modle.name=x", "data.augmnt=flip")
    assert result.code == 2
    for message in ("train.epoch: unknown key; closest: 'epochs'", "modle: unknown key; closest: 'model'",
                    "data.augmnt: unknown key; closest: 'augment'"):  # fmt: skip
        assert message in result.err
    assert not (tmp_path / "run").exists()


def test_a_config_that_cannot_be_read_is_told(call, tmp_path):
    result = call(train_det.main, "--config", tmp_path / "no.yaml", "--output", tmp_path / "run")
    assert (result.code, result.err) == (
        2, f"error: {tmp_path / 'no.yaml'}: cannot be read: No such file or directory\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just some text", "weights must hold tensors only, got a damaged file"),
        (b"", "weights must hold tensors only, got a damaged file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_that_is_none_is_told(train, tmp_path, content, message, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    result = train(f"model.weights={path}")
    assert result.code == 2
    expected = message if suffix == ".pth" else "must be a safetensors file, got a damaged or other file"
    assert f"{path}: {expected}" in result.err
    assert not (tmp_path / "run").exists()


def test_weights_of_another_model_are_told(train, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    result = train(f"model.weights={path}")
    assert result.code == 2
    assert f"{path}: weights must be those of the model, got a checkpoint of another model" in result.err
    assert not (tmp_path / "run").exists()


BOMB = '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><annotation><filename>&b;</filename></annotation>'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: text.replace("</object>", "<object>"),
            "Annotations/train_00000.xml: must be plain XML, got",
        ),
        (lambda text: BOMB, "Annotations/train_00000.xml: must be plain XML, got EntitiesForbidden"),
        (lambda text: "", "Annotations/train_00000.xml: must be plain XML, got"),
        (
            lambda text: text.replace("<xmin>", "<xmin>9", 1),
            "Annotations/train_00000.xml: object 1: xmax must not be less than xmin, got xmin=9",
        ),
        (
            lambda text: text.replace("<width>96", "<width>9"),
            "Annotations/train_00000.xml: object 1: box must lie inside the image of 9x80",
        ),
        (
            lambda text: text.replace("<name>", "<name>not ", 1),
            "add it to classes or set other_classes: ignore",
        ),
    ],
    ids=["malformed", "entity expansion", "empty", "inverted box", "box outside", "other class"],
)
def test_a_bad_annotation_is_told_by_file_before_anything_is_written(
    train, tmp_path, own_devkit, damage, message
):
    path = annotation(own_devkit)
    path.write_text(damage(path.read_text()))
    result = train(f"data.root={own_devkit}")
    assert result.code == 2
    assert message in result.err
    assert "train_00000.xml" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_jpeg_stops_in_mid_training_by_name_and_keeps_the_run(
    train, tmp_path, own_devkit, workers
):
    image = own_devkit / "VOC2012/JPEGImages/train_00007.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    settings = [
        f"data.root={own_devkit}",
        "train.max_steps=6",
        "train.checkpoint_steps=1",
        f"train.workers={workers}",
    ]
    result = train(*settings)
    assert result.code == 2
    assert f"{image}: must be a whole JPEG or PNG image, got " in result.err
    assert (tmp_path / "run/config.yaml").exists()
    assert not (tmp_path / "run/metrics.json").exists()
    image.write_bytes(whole)
    assert train(*settings, resume=True).code == 0
    assert train(*settings, output="whole").code == 0
    assert same_tensors(tmp_path / "run", tmp_path / "whole")


def test_a_folder_with_a_run_is_refused_and_left_as_it_is(train, tmp_path):
    train()
    before = (tmp_path / "run/model.safetensors").stat().st_mtime_ns
    result = train()
    assert result.code == 2
    assert f"error: {tmp_path / 'run'}: holds a run already; give --resume to continue it, or" in result.err
    assert (tmp_path / "run/model.safetensors").stat().st_mtime_ns == before


def test_resuming_with_another_config_is_refused(train, tmp_path):
    train()
    result = train("train.lr=0.5", resume=True)
    assert result.code == 2
    assert f"{tmp_path / 'run'}: must have the config that it was begun with, got " in result.err
    assert "; resume it with --config" in result.err


def test_resuming_a_checkpoint_of_another_model_is_refused(train, tmp_path):
    train("train.max_steps=3", output="float")
    train(output="run")
    (tmp_path / "run/metrics.json").unlink()
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    state["networks"][0]["model"].pop("backbone.stem.0.weight")
    torch.save(state, tmp_path / "run/checkpoint.pt")
    result = train(resume=True)
    assert result.code == 2
    assert "checkpoint.pt: is a checkpoint of another model or optimizer: " in result.err
    assert "backbone.stem.0.weight" in result.err
    shutil.copy(tmp_path / "float/checkpoint.pt", tmp_path / "run/checkpoint.pt")
    result = train(resume=True)
    assert result.code == 2
    assert "training has 3 steps, the config and data now give 2" in result.err


def test_an_output_that_is_a_file_is_told(train, tmp_path):
    (tmp_path / "run").write_text("mine")
    result = train()
    assert (result.code, (tmp_path / "run").read_text()) == (2, "mine")
    assert f"{tmp_path / 'run'}: cannot be made: File exists" in result.err


@pytest.mark.parametrize("precision", ["W4", "float"])
def test_a_loss_that_is_not_finite_stops_with_code_3_and_the_losses(train, tmp_path, precision):
    settings = ["train.lr=1e30", "train.optimizer=sgd", "train.max_steps=4", f"schedule.target={precision}"]
    result = train(*settings)
    assert result.code == 3
    assert (
        "error: step 1: loss is nan (bbox_regression=nan, classification=nan); no checkpoint yet"
        in result.err
    )
    assert not (tmp_path / "run/metrics.json").exists()
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_frozen_batch_norm_leaves_statistics_and_affine_parameters_alone(train, tmp_path, finished_run):
    weights = f"model.weights={finished_run / 'model.safetensors'}"
    train(weights, "train.max_steps=0", output="before")
    train(weights, "model.batch_norm=frozen", "train.weight_decay=0.1", "train.ema=0.5", output="frozen")
    train(weights, "model.batch_norm=train", output="trained")
    before, frozen, trained = (
        load_file(tmp_path / run / "model.safetensors") for run in ("before", "frozen", "trained")
    )
    norms = {key.removesuffix("running_mean") for key in before if key.endswith("running_mean")}
    own = [key for key in before if key.removesuffix(key.rpartition(".")[2]) in norms]
    assert len(own) == 5 * len(norms) > 0
    assert all(torch.equal(frozen[key], before[key]) for key in own)
    assert not any(torch.equal(trained[key], before[key]) for key in own)
    assert not torch.equal(frozen["backbone.stem.0.weight"], before["backbone.stem.0.weight"])


def test_batch_norm_frozen_late_keeps_its_statistics_and_trains_the_rest(train, tmp_path, finished_run):
    weights = f"model.weights={finished_run / 'model.safetensors'}"
    train(weights, "train.max_steps=0", output="before")
    train(weights, "train.freeze_bn_after=0", output="at_once")
    train(weights, "train.freeze_bn_after=0.5", "train.max_steps=2", output="late")
    train(weights, "train.max_steps=2", output="never")
    before, at_once, late, never = (
        load_file(tmp_path / run / "model.safetensors") for run in ("before", "at_once", "late", "never")
    )
    mean, gamma = "backbone.stem.1.running_mean", "backbone.stem.1.weight"
    assert torch.equal(at_once[mean], before[mean])
    assert not torch.equal(at_once[gamma], before[gamma])
    assert not torch.equal(late[mean], before[mean])
    assert not torch.equal(late[mean], never[mean])


def test_batch_norm_is_corrected_before_training(train, tmp_path):
    train("train.max_steps=0", output="plain")
    assert "batch norm corrected on 8 images" in train("train.max_steps=0", "train.correct_bn=8").out
    plain, corrected = (load_file(tmp_path / run / "model.safetensors") for run in ("plain", "run"))
    for key, value in plain.items():
        assert torch.equal(value, corrected[key]) != key.endswith(("running_mean", "running_var")), key


def test_evaluations_on_the_way_are_logged_and_change_nothing(train, tmp_path):
    steps = ["train.epochs=2", "train.max_steps=null", "train.ema=0.5"]
    train(*steps, output="plain")
    train(*steps, "eval.every_epochs=1", output="watched")
    assert same_tensors(tmp_path / "plain", tmp_path / "watched")
    log = [json.loads(line) for line in (tmp_path / "watched/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images"]) for line in log if "voc07_map" in line] == [(3, 6), (6, 6)]


def test_the_batch_norm_statistics_can_be_measured_again_after_training(train, tmp_path):
    train(output="plain")
    assert "batch norm recalibrated on 8 images" in train("train.recalibrate_bn=8").out
    plain, recalibrated = (load_file(tmp_path / run / "model.safetensors") for run in ("plain", "run"))
    for key, value in plain.items():
        assert torch.equal(value, recalibrated[key]) != key.endswith(("running_mean", "running_var")), key


def test_a_config_names_its_run_folder_where_no_output_is_given(call, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(train_det.main, "--config", config.name, "--set", "train.max_steps=0").code == 0
    assert (tmp_path / "runs/tiny/metrics.json").exists()


def test_several_set_arguments_add_up(call, config, tmp_path):
    arguments = ["--set", "seed=1", "train.max_steps=1", "--set", "seed=2"]
    assert call(train_det.main, "--config", config, "--output", tmp_path / "run", *arguments).code == 0
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (written["seed"], written["train"]["max_steps"]) == (2, 1)


def test_an_unknown_detector_is_told_with_detectors_alone(train):
    err = train("model.name=resnet").err
    assert "error: model.name: must be one of ssdlite320_mobilenet_v3_large, " in err
    assert "resnet20_cifar" not in err
