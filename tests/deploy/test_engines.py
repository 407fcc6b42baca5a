"""Stock engines find what torch finds, say what they run in int8, and refuse files that are not ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deploy.detectors import (
    SIZES,
    assert_same_detections,
    in_torch,
    quantized_detector,
    scenes,
    share_kept,
    tiny_classifier,
)  # fmt: skip
from torch import nn

from lbdet.convert import calibrate_activations, quantize_model, quantized_layers
from lbdet.deploy.engines import ENGINES, METADATA_KEY, OnnxEngine, float_layers, read_facts
from lbdet.deploy.export import place, trace
from lbdet.deploy.graph import ClassifierGraph
from lbdet.errors import UserError

SUFFIXES = tuple(ENGINES)
FACTS = {"task": "detection", "classes": ["circle", "cross", "ring"]}
TOYS = [(name, precision) for name in ("ssd_tiny", "faster_rcnn") for precision in ("W4", "W4A8")]
SSDLITE = [pytest.param("ssdlite", precision, marks=pytest.mark.slow) for precision in ("W4", "W4A8")]
LEAST_KEPT = {"ssd_tiny": 0.9, "faster_rcnn": 0.9, "ssdlite": 0.6}
"""share of detections; untrained SSDlite has hundreds of nearly equal scores behind 60 layers of noise"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return what makes a model and its files, once each."""
    made: dict[tuple[str, str], tuple[nn.Module, Path]] = {}

    def export(name: str, precision: str) -> tuple[nn.Module, Path]:
        if (name, precision) not in made:
            path = tmp_path_factory.mktemp(name) / "model.onnx"
            model = quantized_detector(name, precision)
            trace(model, path, FACTS)
            place(path, path.with_suffix(".xml"))
            made[name, precision] = model, path
        return made[name, precision]

    return export


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name, precision", [*TOYS, *SSDLITE])
def test_an_engine_finds_what_torch_finds_on_images_of_all_sizes(exports, name, precision, suffix):
    model, path = exports(name, precision)
    engine = ENGINES[suffix](path.with_suffix(suffix), 1)
    shares = []
    for size in SIZES:
        image = scenes(1, size)[0]
        found, expected = engine.run(image), in_torch(model, image)
        assert found["boxes"].shape == (len(found["scores"]), 4)
        assert bool(np.isfinite(found["scores"]).all())
        if min(size) > 1:  # else all rows are the same, and all scores
            assert len(expected["scores"]) > 5
            shares.append(share_kept(found, expected))
            if precision == "W4" and name != "ssdlite":  # no codes that could flip
                assert_same_detections(found, expected)
    assert np.mean(shares) > LEAST_KEPT[name] if precision == "W4A8" else np.mean(shares) > 0.97


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_found_gives_empty_arrays(tmp_path, suffix):
    model = quantized_detector("ssd_tiny")
    model.score_thresh = 2.0  # type: ignore[assignment]
    trace(model, tmp_path / "a.onnx", FACTS)
    place(tmp_path / "a.onnx", tmp_path / f"b{suffix}")
    found = ENGINES[suffix](tmp_path / f"b{suffix}").run(scenes(1)[0])
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        "boxes": ((0, 4), np.float32), "labels": ((0,), np.int64), "scores": ((0,), np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_classifier_gives_the_scores_of_torch(tmp_path, suffix):
    model = tiny_classifier()
    quantize_model(model, "W4A8")
    images = scenes(4, (32, 32))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.no_grad():
        graph = ClassifierGraph(model, mean, std)
        batch = torch.cat(
            [graph.normalize(torch.from_numpy(i).permute(2, 0, 1)[None].float()) for i in images]
        )
        calibrate_activations(model, lambda: [batch])
        expected = model(batch).softmax(-1).numpy()
    trace(
        model, tmp_path / "a.onnx", {"task": "classification", "classes": ["a", "b", "c"], "image_size": 32}
    )
    place(tmp_path / "a.onnx", tmp_path / f"b{suffix}")
    engine = ENGINES[suffix](tmp_path / f"b{suffix}")
    found = np.stack([engine.run(image)["scores"] for image in images])
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_openvino_runs_every_layer_of_integers_in_int8(exports):
    for name in ("ssd_tiny", "faster_rcnn"):
        model, path = exports(name, "W4A8")
        engine = ENGINES[".xml"](path.with_suffix(".xml"))
        assert set(engine.facts["int8_layers"]) == set(quantized_layers(model))
        assert float_layers(engine) == []


def test_onnxruntime_runs_those_in_int8_whose_output_is_quantized_at_once(exports):
    model, path = exports("ssd_tiny", "W4A8")
    engine = OnnxEngine(path)
    in_float = float_layers(engine)
    assert "backbone.stem.0" not in in_float
    assert {name for name in quantized_layers(model) if name.startswith("head.")} <= set(in_float)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_layers_with_float_inputs_are_not_counted_as_int8(exports, suffix):
    _, path = exports("ssd_tiny", "W4")
    engine = ENGINES[suffix](path.with_suffix(suffix))
    assert engine.facts["int8_layers"] == []
    assert engine.int8_layers() == set()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_engine_tells_its_name_and_version(exports, suffix):
    name = ENGINES[suffix](exports("ssd_tiny", "W4")[1].with_suffix(suffix)).name
    assert name.split()[0] == {".onnx": "onnxruntime", ".xml": "openvino"}[suffix]
    assert name.split()[1][0].isdigit()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 10, 3000])
def test_a_cut_file_is_refused_by_name(exports, tmp_path, suffix, kept):
    source = exports("ssd_tiny", "W4")[1].with_suffix(suffix)
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(source.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"cut{suffix}: must be "):
        ENGINES[suffix](path)


def test_an_xml_without_its_bin_is_refused(exports, tmp_path):
    source = exports("ssd_tiny", "W4")[1].with_suffix(".xml")
    (tmp_path / "a.xml").write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=r"a\.xml: must be an OpenVINO model with its \.bin"):
        ENGINES[".xml"](tmp_path / "a.xml")


def test_a_file_of_another_maker_is_refused(exports, tmp_path):
    model = onnx.load(exports("ssd_tiny", "W4")[1])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"a\.onnx: must be written by tools/export\.py, got a file without"):
        OnnxEngine(tmp_path / "a.onnx")


WHOLE = {"task": "classification", "classes": ["a"], "int8_layers": [], "image_size": 32, "short_side": 37}


def test_facts_that_are_right_are_given_back():
    detector = {"task": "detection", "classes": ["a"], "int8_layers": ["b"], "image_size": None}
    for facts in (WHOLE, WHOLE | {"short_side": None}, detector, detector | {"image_size": 300}):
        assert read_facts(json.dumps(facts), Path("a.onnx")) == facts


@pytest.mark.parametrize(
    "key, value",
    [
        ("task", "x"), ("task", ["detection"]), ("classes", []), ("classes", "dog"), ("classes", ["a", 1]),
        ("int8_layers", None), ("int8_layers", [1]), ("image_size", None), ("image_size", 0),
        ("image_size", True), ("image_size", 32.0), ("short_side", "x"), ("short_side", -1),
    ],
)  # fmt: skip
def test_facts_of_another_kind_or_missing_are_refused_by_name(key, value):
    message = rf"^a\.onnx: metadata must be as this version writes it, got .* as {key}; export it anew$"
    with pytest.raises(UserError, match=message):
        read_facts(json.dumps(WHOLE | {key: value}), Path("a.onnx"))
    with pytest.raises(UserError, match=message.replace(".* as", "none as")):
        read_facts(json.dumps({k: v for k, v in WHOLE.items() if k != key}), Path("a.onnx"))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"task": "detection", "classes": "dog", "int8_layers": []}']
)
def test_a_file_with_other_metadata_is_refused(exports, tmp_path, text):
    model = onnx.load(exports("ssd_tiny", "W4")[1])
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=text)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"a\.onnx: metadata must be as this version writes it"):
        OnnxEngine(tmp_path / "a.onnx")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_engine_that_is_not_installed_is_named_with_the_remedy(exports, monkeypatch, suffix):
    package = {".onnx": "onnxruntime", ".xml": "openvino"}[suffix]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}, which is not installed; pip install"):
        ENGINES[suffix](exports("ssd_tiny", "W4")[1].with_suffix(suffix))


SIGNALS = """
import gc, signal, subprocess, sys
from lbdet.deploy import load
signal.signal(signal.SIGCHLD, lambda *_: None)
for _ in range(2):
    predictor = load(sys.argv[1], threads=1)
del predictor
gc.collect()
subprocess.run(["true"], check=True)
print("alive")
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_signals_are_survived_after_models_were_replaced_and_freed(exports, suffix):
    path = exports("ssd_tiny", "W4A8")[1].with_suffix(suffix)
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS, str(path)], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
