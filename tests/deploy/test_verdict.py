"""A drop of more than 0.3 points or an int8 layer in float is an error, whatever the noise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lbdet.deploy.verdict import judge, summary, write_report
from lbdet.errors import NumericsError

OUT = Path("model.onnx")


def report(drop: float = 0.0, noise: float = 0.0, **others: Any) -> dict[str, Any]:
    means = {k: {"voc07_map": 0.7 - d} for k, d in (("torch", 0.0), ("engine", drop), ("noise", noise))}
    return {
        "engine": "onnxruntime 1.2", "precision": "W4A8", "bytes": 2_500_000, "images": 300, "means": means,
        "drop": drop, "noise_drop": noise, "int8_layers": 3, "float_layers": [], "codes": {}, **others,
    }  # fmt: skip


@pytest.mark.parametrize("drop", [-0.5, 0.0, 0.0029, 0.003])
def test_a_small_drop_or_a_gain_is_good(drop):
    assert judge(OUT, report(drop)) == []


@pytest.mark.parametrize("noise", [-0.02, 0.0, 0.02])
@pytest.mark.parametrize("drop", [0.0031, 0.1, math.nan])
def test_a_larger_drop_is_a_fault_whatever_the_noise_which_is_told(drop, noise):
    with pytest.raises(
        NumericsError, match=r"^model\.onnx in onnxruntime 1\.2: loses .* of voc07_map"
    ) as caught:
        judge(OUT, report(drop, noise))
    assert f"torch itself loses {noise:+.4f} where layer inputs are nudged" in str(caught.value)


def test_the_limit_can_be_another():
    assert judge(OUT, report(0.01), max_drop=0.01) == []
    with pytest.raises(NumericsError, match=r"more than 0\.001 "):
        judge(OUT, report(0.002), max_drop=0.001)


def test_layers_in_float_are_a_fault_with_their_names():
    layers = [f"layer{k}" for k in range(7)]
    with pytest.raises(
        NumericsError, match=r"runs 7 of 9 int8 layers in float \(layer0, .*, layer4, \.\.\.\)"
    ):
        judge(OUT, report(int8_layers=9, float_layers=layers))


def test_on_request_they_are_a_warning_and_a_drop_is_still_a_fault():
    (warning,) = judge(OUT, report(float_layers=["a"]), allow_float_layers=True)
    assert warning == "WARNING: model.onnx runs 1 of 3 int8 layers in float (a)"
    with pytest.raises(NumericsError, match="loses"):
        judge(OUT, report(0.1, float_layers=["a"]), allow_float_layers=True)


def test_both_faults_are_told_at_once():
    with pytest.raises(NumericsError, match=r"loses 0\.1000 .* and runs 1 of 3"):
        judge(OUT, report(0.1, float_layers=["a"]))


def test_the_summary_has_both_means_the_noise_and_the_layers():
    codes = {
        "a": {"engine": {"changed": 0.1}, "noise": {"changed": 0.3}},
        "b": {"engine": {"changed": 0.3}, "noise": None},
    }
    lines = summary(OUT, report(0.01, -0.002, codes=codes, float_layers=["a"]))
    assert lines == [
        "model.onnx: 2.50 MB, W4A8, onnxruntime 1.2",
        "voc07_map on 300 images: torch 0.7000, engine 0.6900 (drop +0.0100); torch nudged by a "
        "millionth 0.7020",
        "codes of layer inputs: 20.0% differ, 30.0% in torch nudged by a millionth",
        "2 of 3 layers with int8 weights and inputs run in int8",
    ]


def test_a_file_without_int8_layers_says_that_all_is_float_but_a_packed_one_is_not_asked():
    assert "all are computed in float" in summary(OUT, report(int8_layers=0))[-1]
    assert len(summary(Path("a.lbw"), report(int8_layers=0))) == 2


def test_a_mean_of_no_classes_is_a_dash_and_a_fault():
    found = report() | {"drop": None, "noise_drop": None}
    found["means"] = {kind: {"voc07_map": None} for kind in found["means"]}
    assert "torch -, engine - (drop -)" in summary(OUT, found)[1]
    with pytest.raises(
        NumericsError, match=r"300 images have no object of the classes that are scored; take more with --par"
    ):
        judge(OUT, found)


def test_reports_of_one_folder_stand_in_one_file(tmp_path):
    write_report(tmp_path / "a.onnx", report(0.1))
    write_report(tmp_path / "b.xml", report(0.2))
    write_report(tmp_path / "a.onnx", report(0.3))
    found = json.loads((tmp_path / "parity.json").read_text())
    assert {name: r["drop"] for name, r in found.items()} == {"a.onnx": 0.3, "b.xml": 0.2}


@pytest.mark.parametrize("before", ["{", "[1]", ""])
def test_a_damaged_report_is_replaced(tmp_path, before):
    (tmp_path / "parity.json").write_text(before)
    write_report(tmp_path / "a.onnx", report())
    assert list(json.loads((tmp_path / "parity.json").read_text())) == ["a.onnx"]
