"""What gradient does a rounding get? The straight-through estimator."""

from __future__ import annotations

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
