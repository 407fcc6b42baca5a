"""The codes of every layer's input, in torch and in an engine, tell where they part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deploy.detectors import CLASSES, scenes, tiny_classifier
from deploy.toys import images, quantized

from lbdet.convert import calibrate_activations, quantize_model, quantized_layers
from lbdet.data.labelled import LabelledData
from lbdet.deploy.codes import code_differences, code_parity, torch_codes
from lbdet.deploy.export import trace
from lbdet.deploy.lower import input_grid
from lbdet.engine.task import ClassificationTask
from lbdet.nn import quantized_input


@pytest.mark.parametrize("bits", [2, 8])
def test_torch_codes_are_the_inputs_that_layers_compute_with(bits):
    model = quantized(f"W4A{bits}")
    inputs, batch = {}, images()
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda m, x, name=name: inputs.update({name: x[0]}))
    found = torch_codes(model, batch)
    assert set(found) == set(inputs) == {"0", "3", "5", "7"}
    for name, layer in quantized_layers(model).items():
        grid = input_grid(name, layer)
        assert grid is not None
        assert found[name].dtype == np.uint8
        with torch.no_grad():
            expected = quantized_input(layer, inputs[name])
        values = (torch.from_numpy(found[name]).float() - grid.zero_point) * grid.scale
        assert torch.equal(values, expected)


def test_torch_codes_leave_no_hook_behind_and_hold_no_weight():
    model = quantized("W4A8")
    torch_codes(model, images())
    assert not any(layer._forward_pre_hooks for layer in quantized_layers(model).values())
    assert all(layer.held_weight is None for layer in quantized_layers(model).values())


def test_layers_without_input_bits_have_no_codes():
    assert torch_codes(quantized("W4"), images()) == {}


def test_differences_are_shares_and_means_over_all_images():
    ours = [{"a": np.array([[0, 255]], np.uint8)}, {"a": np.array([[7, 9]], np.uint8)}]
    theirs = [{"a": np.array([[0, 0]], np.uint8)}, {"a": np.array([[7, 10]], np.uint8)}]
    assert code_differences(ours, theirs) == {"a": {"changed": 0.5, "mean": 64.0}}


def test_layers_that_one_side_lacks_or_of_other_shapes_are_left_out():
    ours = [{"a": np.zeros(3, np.uint8), "b": np.zeros(3, np.uint8), "c": np.zeros(3, np.uint8)}]
    theirs = [{"a": np.zeros(3, np.uint8), "b": np.zeros(4, np.uint8), "d": np.zeros(3, np.uint8)}]
    assert code_differences(ours, theirs) == {"a": {"changed": 0.0, "mean": 0.0}}


def test_empty_inputs_are_left_out():
    empty = [{"a": np.zeros((0, 4), np.uint8)}]
    assert code_differences(empty, empty) == {}


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_wrong_weight_shows_behind_its_layer(tmp_path, suffix):
    model = tiny_classifier()
    quantize_model(model, "W4A8")
    task, pictures = ClassificationTask(), np.stack(scenes(4, (32, 32)))
    data = LabelledData(CLASSES, np.zeros(4, np.int64), pictures)
    calibrate_activations(model, lambda: task.inputs(data, 4, torch.device("cpu")))
    facts = {"task": "classification", "classes": list(CLASSES), "image_size": 32}
    trace(model, tmp_path / "a.onnx", facts)
    good = code_parity(model, tmp_path / "a.onnx", suffix, task, data, None, 2)
    assert set(good) == set(quantized_layers(model))
    assert all(layer["noise"] is not None for layer in good.values())
    names = list(quantized_layers(model))
    with torch.no_grad():
        model.get_parameter(f"{names[0]}.weight").mul_(1.3)  # torch changes, the file does not
    bad = code_parity(model, tmp_path / "a.onnx", suffix, task, data, None, 2)
    assert bad[names[0]]["engine"] == good[names[0]]["engine"]
    assert bad[names[1]]["engine"]["mean"] > 5 * good[names[1]]["engine"]["mean"] + 0.5
