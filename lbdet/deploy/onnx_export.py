"""Write a graph as an ONNX file that says what it holds.

ONNX opset 17. Each lowered layer is `QuantizeLinear -> DequantizeLinear` on its input, `DequantizeLinear` of
its int8 codes (an initializer, one scale an output channel), and a `Conv` or `MatMul` that has the name of
the layer in the trained model (`name@1`, ... where the layer runs several times). Nothing is quantized but
the inputs of layers, so Hardswish, squeeze-and-excitation products and residual sums are computed in float,
as in training; engines move the quantizers through ReLU and max pooling and fuse them into the layer before.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import GraphProto, NodeProto
from torch import Tensor, nn

from lbdet.deploy.engines import METADATA_KEY
from lbdet.deploy.lower import int8_layers, lowered_layers
from lbdet.deploy.onnx_ops import OPSET


def export_onnx(
    graph: nn.Module, example: Tensor, outputs: Sequence[str], path: Path, facts: Mapping[str, Any]
) -> None:
    """Trace a graph and write it, checked.

    Args:
        graph: `image -> tensors`, of lowered layers.
        example: an image, uint8 `[H, W, 3]`. A graph with several outputs takes other sizes, too.
        outputs: names of the tensors. Of several the first dimension is the number of detections.
        path: of the file.
        facts: plain data that the file carries, see `lbdet.deploy.load`. It gets `int8_layers` added: the
            names of the nodes that have int8 codes and quantized inputs.
    """
    axes = {name: {0: "detections"} for name in outputs} | {"image": {0: "height", 1: "width"}}
    trace_onnx(graph, (example,), ["image"], outputs, axes if len(outputs) > 1 else None, path)
    model = onnx.load(path)
    tidy(model.graph, {where: layer.name for where, layer in lowered_layers(graph).items()})
    layers = list(input_codes(model.graph))
    assert {call.split("@")[0] for call in layers} == set(int8_layers(graph))
    facts = {**facts, "int8_layers": layers}
    model.producer_name = METADATA_KEY
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(facts))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def trace_onnx(
    graph: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]] | None,
    path: Path,
) -> None:
    """Write a module as torch's tracing exporter does.

    Args:
        axes: input or output -> its dimensions that vary, by name; None = all are constant.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: the sizes that it keeps are constant
        torch.onnx.export(
            graph.eval(), example, str(path), dynamo=False, opset_version=OPSET, input_names=list(inputs),
            output_names=list(outputs), dynamic_axes=axes,
        )  # fmt: skip


def tidy(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Name the nodes of layers and their outputs as the layers; let all use a constant itself; in place.

    The exporter calls codes as the state dict does, and where several layers have equal ones, they become
    aliases. The shapes that it notes are removed: it gives one name to different dimensions.

    Args:
        names: where a layer is in the traced module -> its name.
    """
    constants = {tensor.name for tensor in graph.initializer}
    aliases = [n for n in graph.node if n.op_type == "Identity" and n.input[0] in constants]
    renamed = {node.output[0]: node.input[0] for node in aliases}
    calls: Counter[str] = Counter()
    for codes, node in _layer_nodes(graph):
        name = names[codes.removesuffix(".codes")]
        calls[name] += 1
        node.name = name if calls[name] == 1 else f"{name}@{calls[name] - 1}"
        renamed[node.output[0]] = node.name
    kept = [node for node in graph.node if node not in aliases]
    _rename(kept, renamed)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)


def input_codes(graph: GraphProto) -> dict[str, str]:
    """Return layer -> the tensor of its input's uint8 codes, for the layers of int8 codes that have one."""
    maker = {output: node for node in graph.node for output in node.output}
    found = {}
    for _, node in _layer_nodes(graph):
        dequantize = maker.get(node.input[0])
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            found[node.name] = dequantize.input[0]
    return found


def with_input_codes(source: Path, path: Path) -> dict[str, str]:
    """Write a copy of an exported file that also returns the codes of its layers' inputs.

    Returns:
        Layer -> name of the output, uint8.
    """
    model = onnx.load(source)
    found = input_codes(model.graph)
    for tensor in dict.fromkeys(found.values()):
        model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.UINT8, None))
    onnx.save(model, path)
    return found


def _layer_nodes(graph: GraphProto) -> list[tuple[str, NodeProto]]:
    """Return the names of codes and the nodes that multiply them."""
    codes = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(".codes")
    }
    return [(codes[n.input[1]], n) for n in graph.node if len(n.input) > 1 and n.input[1] in codes]


def _rename(nodes: Iterable[NodeProto], names: Mapping[str, str]) -> None:
    """Rename tensors, in the bodies of conditions and loops too."""
    for node in nodes:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(tensor, tensor) for tensor in tensors]
        for attribute in node.attribute:
            _rename(attribute.g.node, names)
