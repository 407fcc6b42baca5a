"""The rewrites for OpenVINO change where something is computed, and no value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from lbdet.deploy.openvino_passes import quantize_before_pooling, resize_planes


def model_of(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], shape: list[int]) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def pooled(more_uses: bool = False) -> ModelProto:
    """Pooling with padding, rounding to 8 bits behind it, and two uses of the result."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["m"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["m", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Relu", ["d"], ["r"]),
        helper.make_node("Add", ["d", "m" if more_uses else "r"], ["y"]),
    ]
    scale, zero = np.float32(0.1), np.uint8(100)
    return model_of(nodes, {"scale": np.array(scale), "zero": np.array(zero)}, [1, 3, 9, 7])


def resized(mode: str = "linear") -> ModelProto:
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode=mode)
    return model_of([node], {"sizes": np.array([1, 3, 5, 11], np.int64)}, [1, 3, 9, 7])


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    return np.asarray(found[0])


def kinds(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("make", "rewrite", "tolerance"),
    [(pooled, quantize_before_pooling, 0), (resized, resize_planes, 1e-5)],
)
def test_no_value_changes_but_for_the_rounding_of_resized_images(
    make: Callable[[], ModelProto], rewrite: Callable[[GraphProto], None], tolerance: float
) -> None:
    x = np.random.default_rng(0).normal(0, 8, (1, 3, 9, 7)).astype(np.float32)  # some are beyond the codes
    before, after = make(), make()
    rewrite(after.graph)
    assert kinds(after) != kinds(before)
    onnx.checker.check_model(after, full_check=True)
    assert np.allclose(run(before, x), run(after, x), rtol=0, atol=tolerance)


def test_pooling_comes_last() -> None:
    model = pooled()
    quantize_before_pooling(model.graph)
    assert kinds(model)[:3] == ["QuantizeLinear", "DequantizeLinear", "MaxPool"]


def test_what_is_used_unrounded_too_stays() -> None:
    model = pooled(more_uses=True)
    quantize_before_pooling(model.graph)
    assert kinds(model) == kinds(pooled(more_uses=True))


def test_codes_that_are_an_output_stay() -> None:
    model = pooled()
    model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.UINT8, None))
    quantize_before_pooling(model.graph)
    assert kinds(model)[0] == "MaxPool"


def test_maps_that_are_enlarged_stay() -> None:
    model = resized("nearest")
    resize_planes(model.graph)
    assert kinds(model) == ["Resize"]
