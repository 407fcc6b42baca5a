"""Around the formats: facts of a file, calibrated inputs, and a packed file compared with its model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from deploy.detectors import CLASSES, scenes, tiny_classifier
from deploy.toys import quantized

from lbdet.convert import quantize_model, quantized_layers
from lbdet.data.labelled import LabelledData
from lbdet.data.records import DetectionData
from lbdet.deploy import export
from lbdet.deploy.export import describe, pack, quantize_inputs
from lbdet.deploy.packed import load_packed
from lbdet.engine.task import ClassificationTask
from lbdet.errors import NumericsError, UserError
from lbdet.precision import Precision

FACTS = {"task": "classification", "architecture": "toy", "classes": ["a", "b"], "image_size": 8}
W4 = Precision(4, None)


def labelled() -> LabelledData:
    return LabelledData(CLASSES, np.zeros(4, np.int64), np.stack(scenes(4, (32, 32))))


def test_a_detectors_facts_are_plain_data():
    found = describe(quantized("W4A8"), "ssd_tiny", CLASSES, DetectionData(CLASSES, ()), 300)
    assert json.loads(json.dumps(found)) == found
    assert (found["task"], found["precision"], found["image_size"]) == ("detection", "W4A8", 300)
    assert found["classes"] == list(CLASSES)


@pytest.mark.parametrize("size, expected", [(None, (32, None)), (28, (28, 32))])
def test_a_classifiers_facts_say_how_images_are_cut(size, expected):
    found = describe(quantized("W4"), "toy", CLASSES, labelled(), size)
    assert (found["image_size"], found["short_side"]) == expected
    assert (found["task"], found["precision"]) == ("classification", "W4")


def test_calibrated_inputs_are_for_layers_of_weight_bits_alone():
    model = tiny_classifier()
    quantize_model(model, "W4", keep_float=("fc",))
    quantize_inputs(model, ClassificationTask(), labelled(), 4)
    layers = quantized_layers(model).values()
    assert {str(layer.precision) for layer in layers} == {"W4A8"}
    assert all(layer.activation_quantizer.range(8) is not None for layer in layers)


@pytest.mark.parametrize("precision", ["W4A8", "float"])
def test_where_there_is_nothing_to_calibrate_it_is_refused(precision):
    with pytest.raises(UserError, match=r"^--calibration-images: is for runs of weight bits without"):
        quantize_inputs(quantized(precision), ClassificationTask(), labelled(), 4)


@pytest.mark.parametrize("fold", [False, True])
def test_a_packed_file_is_compared_with_the_model_it_came_from(tmp_path, monkeypatch, fold):
    model = quantized("W4")
    pack(model, tmp_path / "a.lbw", FACTS, W4, fold, entropy=False)
    facts = json.loads(load_packed(tmp_path / "a.lbw").header.config)
    assert facts == {"int8_layers": [], **FACTS}
    real = load_packed

    def another(path):
        packed = real(path)
        packed.tensors["3.weight"][1, 2, 1, 1] *= 1.000001
        return packed

    with torch.no_grad():
        model.get_parameter("3.weight")[1] = 1.0
    monkeypatch.setattr(export, "load_packed", another)
    with pytest.raises(NumericsError, match=r"a\.lbw: 3: weights must come back as they were, got others"):
        pack(model, tmp_path / "a.lbw", FACTS, W4, fold, entropy=False)
