"""Facts of a file, and a packed file compared with its model."""

from __future__ import annotations

import json

import pytest
import torch
from deploy.detectors import CLASSES, labelled
from deploy.toys import quantized

from lbdet.data.records import DetectionData
from lbdet.deploy import certify
from lbdet.deploy.certify import describe, pack
from lbdet.deploy.packed import load_packed
from lbdet.errors import NumericsError
from lbdet.precision import Precision

FACTS = {"task": "classification", "architecture": "toy", "classes": ["a", "b"], "image_size": 8}
W4 = Precision(4, None)


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
    monkeypatch.setattr(certify, "load_packed", another)
    with pytest.raises(NumericsError, match=r"a\.lbw: 3: weights must come back as they were, got others"):
        pack(model, tmp_path / "a.lbw", FACTS, W4, fold, entropy=False)
