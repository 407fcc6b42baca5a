"""`eval_det.py`: several precisions of one model, each from the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lbdet.cli import eval_det
from lbdet.cli.evaluation import _warn_of_other_data
from lbdet.data.records import spread_images
from lbdet.data.shapes import SHAPE_CLASSES
from lbdet.data.voc import read_voc
from lbdet.engine.evaluate import evaluate
from lbdet.models.ssd_tiny import ssd_tiny

SCORES = ("voc07_map", "voc_area_map", "coco_map", "per_class", "images")


@pytest.fixture
def measure(call, tmp_path):
    """Evaluate and return the written JSON."""

    def run(*arguments: object) -> list[dict]:
        assert call(eval_det.main, *arguments, "--output", tmp_path / "out.json").code == 0
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_a_run_evaluates_to_its_own_metrics(measure, finished_run):
    (metrics,) = measure("--run", finished_run)
    own = json.loads((finished_run / "metrics.json").read_text())
    assert {key: metrics[key] for key in (*SCORES, "precision", "model_bytes")} == {
        key: own[key] for key in (*SCORES, "precision", "model_bytes")
    }


def test_other_data_than_the_runs_are_warned_of(call, finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    assert "warning" not in call(eval_det.main, "--run", run).out
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["val"]["sha256"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert (
        "warning: the data differ from those of the run: 6 images, hash "
        in call(eval_det.main, "--run", run).out
    )
    (run / "manifest.json").unlink()
    assert "warning" not in call(eval_det.main, "--run", run).out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "must be JSON, got maximum recursion depth"),
        (b"\xff", "must be JSON in UTF-8, got "),
        (b"[]", "must tell which data the run had, got something else"),
        (b"{}", "must tell which data the run had, got something else"),
        (b'{"data": {"val": {"images": "many", "sha256": "0"}}}', "must tell which data the run had, got"),
        (b'{"data": {"val": {"images": 6, "sha256": [1]}}}', "must tell which data the run had, got"),
        (None, "cannot be read, got Is a directory"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_warned_of_in_one_line(tmp_path, devkit, capsys, content, message):
    path = tmp_path / "manifest.json"
    path.mkdir() if content is None else path.write_bytes(content)
    _warn_of_other_data(path, read_voc(devkit, ["2012:val"], SHAPE_CLASSES))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {path}: {message}")


def test_float_is_the_unquantized_model(measure, finished_run, devkit):
    (metrics,) = measure("--run", finished_run, "--precision", "float", "--split", "2012:train")
    model = ssd_tiny(len(SHAPE_CLASSES) + 1)
    model.load_state_dict(load_file(finished_run / "model.safetensors"))
    four = spread_images(read_voc(devkit, ["2012:train"], SHAPE_CLASSES), 4)  # eval.max_images
    direct = evaluate(model, four).metrics
    assert {key: metrics[key] for key in SCORES} == {key: direct[key] for key in SCORES}
    assert metrics["model_bytes"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert metrics["mean_squared_error"] == 0


def test_float_of_a_run_at_few_bits_has_a_star_and_says_why(call, finished_run, tmp_path):
    out = tmp_path / "out.json"
    result = call(eval_det.main, "--run", finished_run, "--precision", "W4", "float", "--output", out)
    lines = result.out.splitlines()
    assert [line.split(": ")[0] for line in lines[-3:-1]] == ["W4", "float*"]
    assert lines[-1] == "* this run's weights unrounded; for a float model evaluate a float run"
    assert [cell["precision"] for cell in json.loads(out.read_text())] == ["W4", "float"]


def test_float_of_a_config_or_of_a_float_run_has_no_star(call, config, train, tmp_path):
    assert train("schedule.target=float", "train.max_steps=0").code == 0
    for source in (["--run", tmp_path / "run"], ["--config", config]):
        out = call(eval_det.main, *source, "--precision", "float").out
        assert "\nfloat: " in f"\n{out}"
        assert "*" not in out


@pytest.mark.parametrize("recalibrate", [0, 8])
def test_precisions_do_not_depend_on_their_order(measure, finished_run, recalibrate):
    options = ["--recalibrate-bn", recalibrate]
    one = measure("--run", finished_run, "--precision", "W2", "float", "W6", *options)
    other = measure("--run", finished_run, "--precision", "W6", "W2", "float", *options)
    assert [m["precision"] for m in one] == ["W2", "float", "W6"]
    assert {m["precision"]: m for m in one} == {m["precision"]: m for m in other}
    assert measure("--run", finished_run, "--precision", "W6", *options) == one[2:]
    bytes_, errors = [m["model_bytes"] for m in one], [m["mean_squared_error"] for m in one]
    assert bytes_[0] < bytes_[2] < bytes_[1]
    assert errors[1] == 0 < errors[2] < errors[0]


def test_recalibration_measures_statistics_behind_inputs_that_are_quantized(measure, finished_run):
    wide, narrow = measure("--run", finished_run, "--precision", "W6A8", "W6A2", "--recalibrate-bn", 12)
    assert {key: wide[key] for key in SCORES} != {key: narrow[key] for key in SCORES}


def test_recalibration_changes_the_detections_and_not_the_run(measure, finished_run):
    before = (finished_run / "model.safetensors").read_bytes()
    plain, recalibrated = (
        measure("--run", finished_run, "--precision", "W2", "--recalibrate-bn", n)[0] for n in (0, 12)
    )
    assert recalibrated["recalibrate_bn"] == 12
    assert {key: plain[key] for key in SCORES} != {key: recalibrated[key] for key in SCORES}
    assert (finished_run / "model.safetensors").read_bytes() == before


def test_corrected_statistics_start_from_the_stored_ones_at_each_precision(measure, config):
    one = measure("--config", config, "--precision", "W2", "W6", "--correct-bn", 8)
    other = measure("--config", config, "--precision", "W6", "W2", "--correct-bn", 8)
    assert one == other[::-1]
    assert one[0]["correct_bn"] == 8


def test_layers_with_a_width_of_their_own_keep_it_but_for_float(measure, config, finished_run):
    arguments = [
        "--config",
        config,
        "--set",
        f"model.weights={finished_run / 'model.safetensors'}",
        "eval.max_images=1",
    ]
    overrides = "quantizer.overrides={head.*: {precision: W8, weight: {format: uniform}}}"
    plain = {m["precision"]: m for m in measure(*arguments, "--precision", "W4", "float")}
    mixed = {m["precision"]: m for m in measure(*arguments, overrides, "--precision", "W4", "float")}
    assert mixed["W4"]["model_bytes"] > plain["W4"]["model_bytes"]
    assert mixed["float"]["model_bytes"] == plain["float"]["model_bytes"]
    assert mixed["float"]["voc07_map"] == plain["float"]["voc07_map"]


def test_a_config_is_evaluated_without_training(measure, config, finished_run):
    weights = f"model.weights={finished_run / 'model.safetensors'}"
    (from_config,) = measure("--config", config, "--set", weights)
    (from_run,) = measure("--run", finished_run)
    assert {key: from_config[key] for key in SCORES} == {key: from_run[key] for key in SCORES}


def test_another_split_has_other_images(measure, finished_run):
    (val,), (train,) = (
        measure("--run", finished_run, "--split", split) for split in ("2012:val", "2012:train")
    )
    assert {n: c["objects"] for n, c in val["per_class"].items()} != {
        n: c["objects"] for n, c in train["per_class"].items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "{run}", "--split", "2012:test"], "split '2012:test': test.txt must be in"),
        (
            ["--run", "{run}", "--precision", "W4", "W1"],
            "--precision: format 'lbw' has no 1-bit weights, got W1",
        ),
        (["--run", "{run}", "--precision", "4"], "precision must be 'float' or like W4, W4A8, got '4'"),
        (["--run", "{run}", "--set", "seed=1"], "--set: a run keeps its config, got 'seed=1'; use --config"),
        (
            ["--run", "{run}", "--correct-bn", "8"],
            "--correct-bn: is for weights trained at float, got a run trained at W4; use --recalibrate-bn",
        ),
        (["--run", "{run}", "--recalibrate-bn", "-3"], "--recalibrate-bn: must not be negative, got -3"),
        (
            ["--run", "{run}", "--output", "/nowhere/x.json"],
            "--output: must be a file in a folder that exists",
        ),
        (["--run", "{run}", "--output", "{run}"], "--output: must be a file in a folder that exists"),
        (["--run", "/nowhere"], "/nowhere/config.yaml: cannot be read: No such file or directory"),
        (["--config", "{run}/metrics.jsonl"], "metrics.jsonl: "),
    ],
)
def test_a_mistake_is_told_before_anything_is_evaluated(call, finished_run, arguments, message):
    result = call(eval_det.main, *(argument.format(run=finished_run) for argument in arguments))
    assert result.code == 2
    assert message in result.err
    assert "mAP" not in result.out


@pytest.mark.parametrize("arguments", [[], ["--run", "a", "--config", "b"]])
def test_one_source_of_weights_must_be_given(arguments):
    with pytest.raises(SystemExit) as caught:
        eval_det.main(arguments)
    assert caught.value.code == 2


def broken(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "broken")


def test_an_unfinished_run_is_told(call, finished_run, tmp_path):
    run = broken(finished_run, tmp_path)
    (run / "model.safetensors").unlink()
    result = call(eval_det.main, "--run", run)
    assert result.code == 2
    assert f"{run}: has no model.safetensors yet; finish it with tools/train_det.py --resume" in result.err


def test_a_run_with_the_weights_of_another_model_is_told(call, finished_run, tmp_path):
    run = broken(finished_run, tmp_path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("ssd_tiny", "ssdlite320_mobilenet_v3_large"))
    result = call(eval_det.main, "--run", run)
    assert result.code == 2
    assert (
        "model.safetensors: weights must be those of the model, got a checkpoint of another model"
        in result.err
    )
