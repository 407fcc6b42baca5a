"""What gradient does a rounding get? The straight-through estimator, and its fast building blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized` with the gradient of `value`.

    Args:
        value: float tensor that is being trained.
        quantized: same shape; what the forward pass uses.

    Returns:
        A view of `quantized`: the same values bit for bit, no copy.

    Gradient:
        dL/dvalue = dL/dquantized everywhere, inside and outside the clip range;
        nothing flows into `quantized`.

    Reference:
        Bengio, Leonard, Courville 2013, arXiv 1308.3432.
    """
    return _StraightThrough.apply(value, quantized)


def where_inside(grad: Tensor, x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return `grad` where low <= x <= high, else 0, a new tensor.

    With numbers for bounds it is one fused pass, an order of magnitude faster than comparing and selecting.

    Args:
        grad: float tensor.
        x: the shape and dtype of `grad`.
        low, high: numbers that are exact in x's dtype, or tensors broadcastable to `x`.
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.where((x >= low) & (x <= high), grad, 0.0)
    below, above = _next_to(low, -math.inf, x.dtype), _next_to(high, math.inf, x.dtype)
    return torch.ops.aten.hardtanh_backward(grad, x, below, above)  # its bounds are outside


def where_at_least(grad: Tensor, x: Tensor, low: float) -> Tensor:
    """Return `grad` where low <= x, infinity too, else 0; as `where_inside`."""
    return torch.ops.aten.threshold_backward(grad, x, _next_to(low, -math.inf, x.dtype))


def sum_to_shape(terms: Tensor, shape: torch.Size) -> Tensor:
    """Return the terms added up to a shape that broadcasts to theirs, a new tensor.

    On a CPU in float64, as `native` adds them; elsewhere, where sums are trees, in their own dtype.
    """
    wide = terms.double() if terms.device.type == "cpu" else terms
    return wide.sum_to_size(shape)


def _next_to(end: float, to: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(end, dtype=dtype), torch.tensor(to, dtype=dtype)).item()
