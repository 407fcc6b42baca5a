"""`export.py`: every format of a run, checked against torch, with an exit code that tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper

from lbdet.build import load_run, read_data
from lbdet.cli import export, train_cls, train_det
from lbdet.convert import quantized_layers
from lbdet.deploy import load
from lbdet.deploy.packed import load_packed
from lbdet.engine.evaluate import detect
from lbdet.nn import quantized_weight

SUFFIXES = {"packed": ".lbw", "onnx": ".onnx", "openvino": ".xml"}
ALLOWED = ("--allow-float-layers", "--max-drop", "100")
"""what a detector of ten steps needs: its mean says nothing"""


@pytest.fixture(scope="module")
def a8_run(tmp_path_factory, finished_run) -> Path:
    """A run of ten steps with 8-bit inputs."""
    run = tmp_path_factory.mktemp("a8") / "run"
    arguments = ["--config", str(finished_run / "config.yaml"), "--output", str(run)]
    assert train_det.main([*arguments, "--set", "schedule.target=W4A8"]) == 0
    return run


@pytest.fixture(scope="module")
def classifier_run(tmp_path_factory) -> Path:
    """A run of two steps of a classifier of three shades, with W8A8 ends."""
    folder = tmp_path_factory.mktemp("classifier")
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 16), ("test", 8)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        noise = random.integers(0, 40, (count, 32, 32, 3))
        arrays |= {
            f"x_{split}": (labels[:, None, None, None] * 80 + noise).astype(np.uint8),
            f"y_{split}": labels,
        }
    np.savez(folder / "shades.npz", classes=np.array(["dark", "grey", "light"]), **arrays)
    ends = {"precision": "W8A8", "weight": {"format": "uniform"}}
    config = {
        "model": {"name": "resnet20_cifar"},
        "data": {"name": "npz", "root": str(folder / "shades.npz"), "train": ["train"], "val": ["test"]},
        "quantizer": {"weight": {"format": "dorefa"}, "activation": {"format": "dorefa", "clip": "learned"},
                      "overrides": {"conv1": ends | {"activation": {"format": "uniform"}}}},
        "schedule": {"target": "W4A4"},
        "train": {"max_steps": 2, "batch_size": 8, "lr": 0.001, "warmup_steps": 0, "workers": 0,
                  "calibration_images": 8},
    }  # fmt: skip
    config["data"]["augment"] = "cifar"
    (folder / "a.yaml").write_text(yaml.safe_dump(config))
    assert train_cls.main(["--config", str(folder / "a.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def ship(call, tmp_path):
    def run(source: Path, form: str, *options: object, name: str = "model"):
        output = tmp_path / f"{name}{SUFFIXES[form]}"
        return call(export.main, "--run", source, "--format", form, "--output", output, *options), output

    return run


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_an_export_finds_the_objects_of_the_run_and_leaves_its_report(ship, a8_run, tmp_path, form):
    result, output = ship(a8_run, form, *ALLOWED)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "parity.json").read_text())[output.name]
    assert report["images"] == 4  # as the run was evaluated
    assert report["int8_layers"] == 18
    assert report["engine"].startswith({"onnx": "onnxruntime", "openvino": "openvino"}[form])
    assert len(report["codes"]) == 18
    assert "voc07_map on 4 images: torch" in result.out
    built = load_run(a8_run)
    val = read_data(built.config.data, built.config.data.val)
    (expected, *_) = detect(built.model, val, 1, 0)
    found = load(output)(val.records[0].path)
    np.testing.assert_allclose(found["scores"][:5], expected["scores"][:5], atol=0.03)


def test_openvino_runs_all_layers_in_int8(ship, a8_run, tmp_path):
    result, _ = ship(a8_run, "openvino", "--max-drop", 100)
    assert result.code == 0
    assert "18 of 18 layers with int8 weights and inputs run in int8" in result.out
    assert json.loads((tmp_path / "parity.json").read_text())["model.xml"]["float_layers"] == []
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.bin", "model.xml", "parity.json"]


def test_layers_that_the_engine_runs_in_float_are_code_3_and_the_file_and_report_stay(ship, a8_run, tmp_path):
    result, output = ship(a8_run, "onnx", "--max-drop", 100)
    assert result.code == 3
    assert "error: " in result.err
    assert " of 18 int8 layers in float (" in result.err
    assert "see parity.json" in result.err
    assert output.is_file()
    assert json.loads((tmp_path / "parity.json").read_text())["model.onnx"]["float_layers"]
    assert "WARNING" in ship(a8_run, "onnx", *ALLOWED)[0].out


@pytest.mark.slow
def test_a_drop_is_code_3(ship, a8_run, monkeypatch):
    from lbdet.cli import export as module

    real = module.parity
    monkeypatch.setattr(module, "parity", lambda *a: {**real(*a), "drop": 0.0031})
    result, _ = ship(a8_run, "openvino", "--parity-images", 1)
    assert result.code == 3
    assert "loses 0.0031 of voc07_map against torch, more than 0.003" in result.err


@pytest.mark.slow
def test_the_weights_in_the_onnx_file_are_the_runs_up_to_batch_norm(ship, a8_run):
    _, output = ship(a8_run, "onnx", *ALLOWED, "--parity-images", 1)
    model = onnx.load(output)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    maker = {o: node for node in model.graph.node for o in node.output}
    layers = quantized_layers(load_run(a8_run).model)
    nodes = {node.name: node for node in model.graph.node if node.name in layers}
    assert nodes.keys() == layers.keys()
    for name, node in nodes.items():
        codes, scales = (constants[i] for i in maker[node.input[1]].input)
        weight = quantized_weight(layers[name]).detach().cpu().numpy()
        rows = (codes * scales.reshape(-1, 1, 1, 1)).reshape(len(codes), -1)
        for ours, theirs in zip(rows, weight.reshape(len(codes), -1), strict=True):
            largest = np.abs(theirs).argmax()  # each channel is a multiple of the trained one
            if theirs[largest]:
                np.testing.assert_allclose(ours / ours[largest], theirs / theirs[largest], rtol=1e-6)


@pytest.mark.parametrize(
    "options", [[], ["--fold-batch-norm"], ["--entropy"], ["--fold-batch-norm", "--entropy"]]
)
def test_a_packed_file_comes_back_bit_for_bit_and_tells_its_size(ship, finished_run, options):
    if "--entropy" in options:
        pytest.importorskip("constriction")
    result, output = ship(finished_run, "packed", *options, "--max-drop", 100)
    assert result.code == 0, result.err
    assert "of the float state dict" in result.out
    folded = "--fold-batch-norm" in options
    end = "up to float32's rounding where batch norm is folded" if folded else "bit for bit"
    assert f"read back, every weight is as it was, {end}" in result.out
    assert ("entropy" in result.out) == ("--entropy" in options)
    tensors = load_packed(output).tensors
    if not folded:
        for name, layer in quantized_layers(load_run(finished_run).model).items():
            assert (tensors[f"{name}.weight"] == quantized_weight(layer).detach().cpu()).all()


def test_the_packed_model_finds_in_torch_what_the_run_finds(ship, finished_run, tmp_path):
    result, output = ship(finished_run, "packed")
    assert result.code == 0
    report = json.loads((tmp_path / "parity.json").read_text())["model.lbw"]
    assert report["drop"] == 0
    assert report["differences"]["engine"]["lost"] == 0
    built = load_run(finished_run)
    val = read_data(built.config.data, built.config.data.val)
    for record, expected in zip(val.records, detect(built.model, val, 1, 0), strict=True):
        found = load(output)(record.path)  # the run's weights are stored channels last, so sums differ
        assert all(np.allclose(found[key], expected[key], atol=1e-3) for key in expected)


@pytest.mark.slow
def test_a_run_without_input_bits_gets_calibrated_ones(ship, finished_run, tmp_path):
    result, _ = ship(finished_run, "openvino", "--calibration-images", 3, "--max-drop", 100)
    assert result.code == 0
    assert "activations calibrated on 3 images" in result.out
    report = json.loads((tmp_path / "parity.json").read_text())["model.xml"]
    assert (report["precision"], report["int8_layers"], report["float_layers"]) == ("W4A8", 18, [])


@pytest.mark.slow
def test_without_them_it_says_that_all_is_float(ship, finished_run):
    result, _ = ship(finished_run, "openvino", "--max-drop", 100)
    assert result.code == 0
    assert "no layer has both int8 weights and inputs, so all are computed in float" in result.out


@pytest.mark.slow
def test_wide_lbw_is_refused_by_name_and_leaves_no_file(ship, train, tmp_path):
    assert train("schedule.target=W6").code == 0
    result, output = ship(tmp_path / "run", "onnx")
    assert result.code == 2
    assert "backbone.stem.0: 6-bit weights of format 'lbw' must have codes up to 127" in result.err
    assert not output.exists()
    assert ship(tmp_path / "run", "onnx", "--float-weights", "--max-drop", 100)[0].code == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", SUFFIXES)
def test_a_classifier_is_shipped_too(ship, classifier_run, tmp_path, form):
    result, output = ship(classifier_run, form, *(ALLOWED if form == "onnx" else ("--max-drop", 100)))
    assert result.code == 0, result.err
    assert "top1 on 8 images: torch" in result.out
    report = json.loads((tmp_path / "parity.json").read_text())[output.name]
    assert report["differences"]["engine"]["largest_score_difference"] < 0.05
    found = load(output)(np.full((32, 32, 3), 90, np.uint8))
    assert found["scores"].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "a.txt"], "--output: must end in .onnx for onnx, got"),
        (["--output", "none/a.onnx"], "--output: must be a file in a folder that exists"),
        (["--parity-images", 0], "--parity-images: must be at least 1, got 0"),
        (["--calibration-images", -1], "--calibration-images: must be at least 1, got -1"),
        (["--max-drop", -1], "--max-drop: must lie in [0, 100], got -1"),
        (["--entropy"], "--entropy: is not for onnx; leave it out"),
        (["--fold-batch-norm"], "--fold-batch-norm: is not for onnx; leave it out"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_is_read(ship, options, message):
    result, _ = ship(Path("no_run"), "onnx", *options)
    assert result.code == 2
    assert message in result.err


def test_a_packed_file_takes_no_options_of_engines(ship):
    result, _ = ship(Path("no_run"), "packed", "--float-weights")
    assert result.code == 2
    assert "--float-weights: is not for packed; leave it out" in result.err


def test_what_is_no_run_is_refused(ship, tmp_path):
    assert ship(tmp_path, "packed")[0].code == 2


def test_calibration_of_a_run_that_has_input_bits_is_refused(ship, a8_run):
    result, _ = ship(a8_run, "onnx", "--calibration-images", 3)
    assert result.code == 2
    assert "--calibration-images: is for runs of weight bits without activation bits" in result.err
