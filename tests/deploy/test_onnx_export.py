"""The exported file holds the very weights that training used, under the names of the layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deploy.detectors import as_input, quantized_detector, scenes
from deploy.toys import quantized
from onnx import numpy_helper
from torch import Tensor, nn

from lbdet.convert import Override, WeightFormat, calibrate_activations, quantize_model, quantized_layers
from lbdet.deploy.codes import engine_codes, torch_codes
from lbdet.deploy.engines import METADATA_KEY
from lbdet.deploy.export import trace
from lbdet.deploy.fold import batch_norm_pairs, factor_and_bias
from lbdet.deploy.integers import integer_weight
from lbdet.deploy.lower import input_grid, lower
from lbdet.deploy.onnx_export import export_onnx, with_input_codes
from lbdet.deploy.onnx_ops import OPSET
from lbdet.errors import UserError
from lbdet.nn import quantized_weight
from lbdet.precision import Precision

CLASSIFIER = {"task": "classification", "classes": ["a", "b"], "image_size": 8}
DETECTOR = {"task": "detection", "classes": ["a", "b", "c"]}
QUICK = [("lbw", 2, {}), ("lbw", 4, {"granularity": "per_tensor"}), ("uniform", 8, {}), ("dorefa", 4, {})]
EXACT = [
    *(("lbw", bits, {"granularity": g}) for bits in (2, 3, 4) for g in ("per_tensor", "per_channel")),
    *(("uniform", bits, {"granularity": g}) for bits in range(2, 9) for g in ("per_tensor", "per_channel")),
    *(("uniform", bits, {"symmetric": False}) for bits in range(2, 8)),
    *(("dorefa", bits, {}) for bits in range(1, 8)),
    *(("binary", 1, {"granularity": g}) for g in ("per_tensor", "per_channel")),
]
"""every format at every width that int8 can hold"""


FIRST = ("backbone.stem.0", "backbone.stage1.0", "backbone.stage2.0.0")
"""layers to which onnxruntime's rounding of biases has not spread yet"""


class Stored:
    """What a file has of each layer."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.nodes = {node.name: node for node in self.model.graph.node}
        self.maker = {output: node for node in self.model.graph.node for output in node.output}
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        self.facts = json.loads({e.key: e.value for e in self.model.metadata_props}[METADATA_KEY])

    def weight(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return codes and scales of a layer, as `[C, ...]` and `[C]`."""
        node = self.nodes[name]
        dequantize = self.maker[node.input[1]]
        assert dequantize.op_type == "DequantizeLinear"
        assert len(dequantize.input) == 2, "the zero point is 0"
        codes, scales = (self.constants[name] for name in dequantize.input)
        axis = dequantize.attribute[0].i
        assert axis == (0 if node.op_type == "Conv" else 1)
        return (codes if axis == 0 else codes.T), scales

    def input(self, name: str) -> tuple[float, int]:
        """Return scale and zero point of a layer's input."""
        dequantize = self.maker[self.nodes[name].input[0]]
        quantize = self.maker[dequantize.input[0]]
        assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
        assert quantize.input[1:] == dequantize.input[1:]
        scale, zero = (self.constants[name] for name in quantize.input[1:])
        assert zero.dtype == np.uint8
        return float(scale), int(zero)


def exported(
    model: nn.Module, folder: Path, facts: dict | None = None, float_weights: bool = False
) -> Stored:
    trace(model, folder / "a.onnx", facts or CLASSIFIER, float_weights)
    return Stored(folder / "a.onnx")


@pytest.mark.parametrize(
    "form, bits, options", [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in EXACT)]
)
def test_codes_times_scales_are_the_weights_times_batch_norm(tmp_path, form, bits, options):
    model = quantized(f"W{bits}A8", WeightFormat(form, options))
    stored = exported(model, tmp_path)
    pairs, _ = batch_norm_pairs(model)
    assert stored.facts["int8_layers"] == ["0", "3", "5", "7"]
    for name, layer in quantized_layers(model).items():
        codes, scales = stored.weight(name)
        assert (codes.dtype, scales.dtype) == (np.int8, np.float32)
        weight, found = quantized_weight(layer).detach(), integer_weight(name, layer)
        rows = scales.reshape(-1, *[1] * (codes.ndim - 1))
        if name not in pairs:
            factor = int(np.abs(codes.astype(int)).max()) // int(found.codes.int().abs().max())
            np.testing.assert_array_equal(codes, found.codes.numpy() * factor)
            np.testing.assert_array_equal(scales, found.scale.numpy() / factor)
            exact = form != "dorefa"
            np.testing.assert_allclose(codes * rows, weight.numpy(), rtol=0 if exact else 2**-23)
        else:
            norm = model.get_submodule(pairs[name])
            assert isinstance(norm, nn.BatchNorm2d)
            factor = factor_and_bias(norm, layer.bias)[0]
            sign = factor.sign().to(torch.int8).view(-1, 1, 1, 1)
            signed = (found.codes * sign).numpy().astype(int)
            np.testing.assert_array_equal(
                codes, signed * (np.abs(codes.astype(int)).max() // np.abs(signed).max())
            )
            expected = weight.double() * factor.view(-1, 1, 1, 1)
            np.testing.assert_allclose(codes * rows.astype(np.float64), expected.numpy(), rtol=2**-22)


def test_inputs_have_the_scales_and_zero_points_of_the_model(tmp_path):
    model = quantized("W4A8")
    stored = exported(model, tmp_path)
    for name, layer in quantized_layers(model).items():
        grid = input_grid(name, layer)
        assert grid is not None
        assert stored.input(name) == (grid.scale, grid.zero_point)


def test_only_inputs_of_layers_are_quantized(tmp_path):
    stored = exported(quantized_detector("ssd_tiny"), tmp_path, DETECTOR)
    kinds = [node.op_type for node in stored.model.graph.node]
    layers = len(stored.facts["int8_layers"])
    assert kinds.count("QuantizeLinear") == layers
    assert kinds.count("DequantizeLinear") == 2 * layers
    assert "BatchNormalization" not in kinds


@pytest.mark.parametrize("name", ["ssd_tiny", "faster_rcnn"])
def test_nodes_have_the_names_of_the_trained_layers(tmp_path, name):
    model = quantized_detector(name)
    stored = exported(model, tmp_path, DETECTOR)
    assert set(stored.facts["int8_layers"]) == set(quantized_layers(model))
    assert all(stored.nodes[n].op_type in ("Conv", "MatMul") for n in quantized_layers(model))


def test_layers_that_stay_float_are_no_int8_layers_and_keep_their_weights(tmp_path):
    model = quantized("W4A8", overrides=(Override("3", Precision.parse("float")),), keep_float=("5",))
    stored = exported(model, tmp_path)
    assert stored.facts["int8_layers"] == ["0", "7"]
    floats = [node for node in stored.model.graph.node if node.op_type == "Conv" and node.name != "0"]
    shapes = [stored.constants[node.input[1]].shape for node in floats]
    assert shapes == [(6, 6, 3, 3), (4, 6, 1, 1)]
    found = stored.constants[floats[1].input[1]]
    np.testing.assert_array_equal(found, model.get_parameter("5.weight").detach().numpy())


def test_layers_of_8_and_4_bits_are_both_exact(tmp_path):
    model = quantized("W4A8", overrides=(Override("7", Precision.parse("W8A8"), WeightFormat("uniform")),))
    codes, scales = exported(model, tmp_path).weight("7")
    np.testing.assert_array_equal(
        codes * scales[:, None], quantized_weight(quantized_layers(model)["7"]).detach()
    )
    assert len(np.unique(codes)) > 17


@pytest.mark.parametrize("form, bits", [("lbw", 5), ("lbw", 6), ("dorefa", 8), ("learned_levels", 4)])
def test_what_int8_cannot_hold_is_refused_by_name_or_stored_as_float(tmp_path, form, bits):
    model = quantized(f"W{bits}A8", WeightFormat(form))
    with pytest.raises(UserError, match=rf"^0: {bits}-bit weights of format '{form}' "):
        exported(model, tmp_path)
    stored = exported(model, tmp_path, float_weights=True)
    assert stored.facts["int8_layers"] == []
    weight = quantized_weight(quantized_layers(model)["5"]).detach().numpy()
    assert any(np.array_equal(value, weight) for value in stored.constants.values())


def test_the_file_says_what_it_is_and_passes_the_checker(tmp_path):
    stored = exported(quantized_detector("ssd_tiny"), tmp_path, DETECTOR)
    onnx.checker.check_model(stored.model, full_check=True)
    assert [(o.domain, o.version) for o in stored.model.opset_import] == [("", OPSET)]
    (image,) = stored.model.graph.input
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    dims = image.type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["height", "width", 3]
    assert [o.name for o in stored.model.graph.output] == ["boxes", "labels", "scores"]
    assert {k: stored.facts[k] for k in DETECTOR} == DETECTOR


class Twice(nn.Module):
    """Calls one layer twice, and has two layers with the same codes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.right.load_state_dict(self.left.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x))
        return (self.left(x) + self.right(x.sigmoid())).mean((2, 3))


def twice() -> nn.Module:
    model = Twice().eval()
    quantize_model(model, "W4A8")
    calibrate_activations(
        model, lambda: [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    )
    return model


def test_every_call_of_a_layer_and_equal_layers_have_names_of_their_own(tmp_path):
    stored = exported(twice(), tmp_path)
    assert sorted(stored.facts["int8_layers"]) == ["left", "right", "shared", "shared@1"]
    for name in stored.facts["int8_layers"]:
        np.testing.assert_array_equal(stored.weight(name)[0].shape, (3, 3, 1, 1))


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_codes_of_inputs_are_those_in_torch(tmp_path, suffix):
    model = quantized_detector("ssd_tiny")
    exported(model, tmp_path, DETECTOR)
    images = scenes(2)
    found = engine_codes(tmp_path / "a.onnx", suffix, images)
    for image, codes in zip(images, found, strict=True):
        expected = torch_codes(model, [as_input(image)])
        assert set(codes) == set(expected) == set(quantized_layers(model))
        for name, values in expected.items():
            assert values.shape == codes[name].shape
            assert codes[name].dtype == np.uint8
            steps = np.abs(values.astype(int) - codes[name])
            assert (steps > 0).mean() < (0.01 if suffix == ".xml" or name in FIRST else 0.5), name


def test_a_copy_with_codes_leaves_the_file_alone(tmp_path):
    stored = exported(quantized("W4A8"), tmp_path)
    before = (tmp_path / "a.onnx").read_bytes()
    names = with_input_codes(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert list(names) == stored.facts["int8_layers"]
    assert (tmp_path / "a.onnx").read_bytes() == before
    assert len(onnx.load(tmp_path / "b.onnx").graph.output) == 5


def test_any_graph_of_lowered_layers_can_be_written(tmp_path):
    graph = lower(twice())
    export_onnx(Wrapped(graph), torch.zeros(8, 8, 3, dtype=torch.uint8), ["y"], tmp_path / "c.onnx", {})
    assert Stored(tmp_path / "c.onnx").facts == {"int8_layers": ["shared", "shared@1", "left", "right"]}


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.deep = nn.Sequential(model)

    def forward(self, image: Tensor) -> Tensor:
        return self.deep(image.permute(2, 0, 1)[None].float())
