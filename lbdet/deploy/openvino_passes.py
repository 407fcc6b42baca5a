"""Rewrites of an exported ONNX graph after which OpenVINO is faster; values stay, but for float's rounding.

MaxPool -> QuantizeLinear -> DequantizeLinear    the two before the MaxPool: it pools 8-bit codes then
Resize of [1, 3, H, W]                           of [3, H, W], for which its kernel is twice as fast
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper


def quantize_before_pooling(graph: GraphProto) -> None:
    """Round before max pooling instead of behind it, in place: rounding keeps order, so the maxima agree."""
    maker = {output: node for node in graph.node for output in node.output}
    uses = Counter(tensor for node in graph.node for tensor in node.input)
    uses.update(output.name for output in graph.output)
    kept = list(graph.node)
    for dequantize in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        quantize = maker.get(dequantize.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        pool = maker.get(quantize.input[0])
        if pool is None or pool.op_type != "MaxPool" or uses[pool.output[0]] + uses[quantize.output[0]] != 2:
            continue
        pooled, rounded = pool.input[0], f"{dequantize.output[0]}_before_pooling"
        quantize.input[0], pool.input[0] = pooled, rounded
        pool.output[0], dequantize.output[0] = dequantize.output[0], rounded
        i = min(kept.index(node) for node in (pool, quantize, dequantize))
        kept = [node for node in kept if node not in (pool, quantize, dequantize)]
        kept[i:i] = [quantize, dequantize, pool]
    _replace_nodes(graph, kept)


def resize_planes(graph: GraphProto) -> None:
    """Resize an image, the only thing that is resized bilinearly, without its batch dimension; in place."""
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "Resize" or _mode(node) != "linear":
            kept.append(node)
            continue
        x, sizes, y = node.input[0], node.input[3], node.output[0]
        for name, value in (("batch", 0), ("first", 1), ("end", 4)):
            tensor = numpy_helper.from_array(np.array([value], np.int64), f"{y}_{name}")
            graph.initializer.append(tensor)
        resize = NodeProto()
        resize.CopyFrom(node)
        resize.input[0], resize.input[3], resize.output[0] = f"{y}_planes", f"{y}_sizes", f"{y}_resized"
        kept += [
            helper.make_node("Squeeze", [x, f"{y}_batch"], [f"{y}_planes"]),
            helper.make_node("Slice", [sizes, f"{y}_first", f"{y}_end"], [f"{y}_sizes"]),
            resize,
            helper.make_node("Unsqueeze", [f"{y}_resized", f"{y}_batch"], [y]),
        ]
    _replace_nodes(graph, kept)


def _mode(node: NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "mode"), "nearest")


def _replace_nodes(graph: GraphProto, nodes: list[NodeProto]) -> None:
    copies = []
    for node in nodes:
        copies.append(copy := NodeProto())
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)
