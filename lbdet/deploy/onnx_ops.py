"""Three operations that torch has no ONNX form of, each with its own: opaque to tracing, one node or two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.onnx import register_custom_op_symbolic  # pyright: ignore[reportPrivateImportUsage]
from torch.onnx.symbolic_helper import parse_args  # pyright: ignore[reportPrivateImportUsage]
from torchvision.ops import batched_nms

OPSET = 17


@torch.library.custom_op("lbdet::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Return scale * codes, float32: `DequantizeLinear` of a constant.

    Args:
        codes: int8.
        scale: float32 `[C]`, one for each index of `axis`.
    """
    return codes * scale.view([-1 if dim == axis else 1 for dim in range(codes.ndim)])


@torch.library.custom_op("lbdet::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return scale * (code - zero point), code = clamp(round(x / scale) + zero point, 0, 255), half to even:
    `QuantizeLinear` and `DequantizeLinear`.

    Args:
        x: float32, any shape.
        scale: float32 `[]`.
        zero_point: uint8 `[]`.
    """
    zero = zero_point.to(x.dtype)
    return (x / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale)


@torch.library.custom_op("lbdet::non_max_suppression", mutates_args=())
def non_max_suppression(boxes: Tensor, scores: Tensor, keep: int, iou: float, score: float) -> Tensor:
    """Suppress overlapping boxes within each row: `NonMaxSuppression` with a row as a batch.

    Args:
        boxes: float32 `[R, K, 4]`.
        scores: float32 `[R, K]`.
        keep: at most so many a row.
        iou: of two boxes that overlap by more, that of the higher score stays.
        score: boxes with more than that are considered.

    Returns:
        int64 `[N, 2]`: row and column of what stays, rows in order, in each the highest score first.
    """
    row, column = torch.where(scores > score)
    kept = batched_nms(boxes[row, column], scores[row, column], row, iou)
    kept = kept[row[kept].argsort(stable=True)]
    row, column = row[kept], column[kept]
    first = torch.searchsorted(row, torch.arange(len(scores), device=row.device))
    place = torch.arange(len(row), device=row.device) - first[row]
    return torch.stack([row, column], 1)[place < keep]


@parse_args("v", "v", "i")
def _dequantize(g: Any, codes: Any, scale: Any, axis: int) -> Any:
    return g.op("DequantizeLinear", codes, scale, axis_i=axis).setType(codes.type().with_dtype(torch.float32))


def _quantize_dequantize(g: Any, x: Any, scale: Any, zero_point: Any) -> Any:
    codes = g.op("QuantizeLinear", x, scale, zero_point)
    return g.op("DequantizeLinear", codes, scale, zero_point)  # shapes of the trace would stick to it


@parse_args("v", "v", "i", "f", "f")
def _non_max_suppression(g: Any, boxes: Any, scores: Any, keep: int, iou: float, score: float) -> Any:
    def constant(value: Any) -> Any:
        return g.op("Constant", value_t=torch.tensor(value))

    one_class = g.op("Unsqueeze", scores, constant([1]))
    limits = constant([keep]), constant([iou]), constant([score])
    found = g.op("NonMaxSuppression", boxes, one_class, *limits)  # row, class, column
    return g.op("Gather", found, constant([0, 2]), axis_i=1)


_SYMBOLS = {
    "dequantize": _dequantize,
    "quantize_dequantize": _quantize_dequantize,
    "non_max_suppression": _non_max_suppression,
}
for _name, _symbol in _SYMBOLS.items():
    register_custom_op_symbolic(f"lbdet::{_name}", _symbol, OPSET)
