"""The OpenVINO file is the ONNX file: the same integers, scales and facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from deploy.detectors import quantized_detector, scenes
from onnx import numpy_helper

from lbdet.deploy.engines import ENGINES
from lbdet.deploy.export import place, trace
from lbdet.deploy.openvino_export import export_openvino
from lbdet.errors import UserError

FACTS = {"task": "detection", "classes": ["circle", "größe", 'a "b" <c>']}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.onnx"
    trace(quantized_detector("ssd_tiny"), path, FACTS)
    return path


def constants(path: Path) -> list[np.ndarray]:
    operations = openvino.Core().read_model(path).get_ops()
    return [op.data for op in operations if op.get_type_name() == "Constant"]


def test_codes_and_scales_are_in_the_file_bit_for_bit(source, tmp_path):
    export_openvino(source, tmp_path / "a.xml")
    found = constants(tmp_path / "a.xml")
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    wanted = {name: value for name, value in tensors.items() if name.endswith((".codes", ".scale"))}
    assert len(wanted) > 30  # of 36: equal ones are stored once
    for name, value in wanted.items():
        same = [c for c in found if c.dtype == value.dtype and c.size == value.size]
        assert any(np.array_equal(c.ravel(), value.ravel()) for c in same), name


def test_no_constant_lost_digits(source, tmp_path):
    export_openvino(source, tmp_path / "a.xml")
    assert not [c for c in constants(tmp_path / "a.xml") if c.dtype == np.float16]


def test_the_facts_are_those_of_the_source(source, tmp_path):
    export_openvino(source, tmp_path / "a.xml")
    engines = [ENGINES[path.suffix](path) for path in (source, tmp_path / "a.xml")]
    assert engines[0].facts == engines[1].facts
    assert engines[0].facts["classes"] == FACTS["classes"]


def test_both_engines_find_the_same_first_detections(source, tmp_path):
    export_openvino(source, tmp_path / "a.xml")
    ours, theirs = (ENGINES[p.suffix](p).run(scenes(1)[0]) for p in (source, tmp_path / "a.xml"))
    assert set(ours) == set(theirs)
    np.testing.assert_allclose(ours["scores"][:20], theirs["scores"][:20], atol=0.05)


def test_nothing_else_is_left_in_the_folder(source, tmp_path):
    place(source, tmp_path / "a.xml")
    place(source, tmp_path / "a.xml")  # again: replaced
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.xml"]


def test_a_folder_that_is_none_is_told(source, tmp_path):
    with pytest.raises(UserError, match=r"none/a\.xml: cannot be written: No such file"):
        place(source, tmp_path / "none" / "a.xml")
    with pytest.raises(UserError, match=r"none/a\.onnx: cannot be written: No such file"):
        place(source, tmp_path / "none" / "a.onnx")
