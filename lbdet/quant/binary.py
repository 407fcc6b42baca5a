"""Which two values stand for a weight or an activation?

One bit: the sign, with sign(0) = sign(-0.0) = +1.

    bits  codes  levels at scale 1
    1     -1, 1  -1, 1

A weight's scale is the mean magnitude of its row, which minimises ||W - scale * sign(W)||^2: that error is
sum (|w| - scale)^2. Activations have no scale.

Reference:
    Rastegari et al. 2016, "XNOR-Net", arXiv 1603.05279. Courbariaux et al. 2016, "Binarized Neural Networks"
    (BinaryNet), arXiv 1602.02830.

Differs from the paper:
    The gradient to a weight is the one at the binary weight; XNOR-Net adds the dependence of the scale on |w|
    and cuts the rest off at |w| > 1. XNOR-Net also scales binary activations by local means of their
    magnitude; here, as in BinaryNet, they are plain signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbdet.quant.rows import as_rows, check_finite, per_row
from lbdet.quant.ste import straight_through

MIN_BITS = MAX_BITS = 1


@dataclass(frozen=True)
class BinaryTensor:
    """Weights as signs."""

    codes: Tensor
    """int8, the weight's shape: -1 or 1"""
    scale: Tensor
    """float32, `[]` (per tensor) or `[C]` (per channel): the mean magnitude, 0 where all weights are zero"""

    @property
    def levels(self) -> Tensor:
        """The two representable values at scale 1, float32 `[2]`."""
        return levels()

    @property
    def level_index(self) -> Tensor:
        """Which of the sorted levels each code stands for, int64, the weight's shape."""
        return (self.codes.long() + 1) // 2

    def dequantize(self) -> Tensor:
        """Return scale * code, float32, the weight's shape, a new tensor."""
        return self.codes * per_row(self.scale, self.codes.ndim)


def levels() -> Tensor:
    """Return the two representable values at scale 1, float32 `[2]`.

    >>> levels()
    tensor([-1.,  1.])
    """
    return torch.tensor([-1.0, 1.0])


def quantize(weight: Tensor, granularity: str = "per_channel") -> BinaryTensor:
    """Find the signs and the mean magnitudes of a weight.

    Zero is not a level: a zero weight becomes +scale, unless its whole row is zero.

    Args:
        weight: float tensor `[C, ...]`, finite; magnitudes are added in float64.
        granularity: "per_tensor", or "per_channel" (one scale for each index of dimension 0).

    Returns:
        A `BinaryTensor`, new. An all-zero row has scale 0 and codes 1.

    Raises:
        ValueError: an unknown granularity.
        NumericsError: the weight has values that are not finite.
    """
    scale = as_rows(weight.detach(), granularity).abs().mean(-1, dtype=torch.float64).float()
    check_finite(scale)
    codes = torch.where(weight >= 0, 1, -1).to(torch.int8)
    return BinaryTensor(codes, scale if granularity == "per_channel" else scale[0])


def fake_quantize(weight: Tensor, granularity: str = "per_channel") -> Tensor:
    """Return `quantize(...).dequantize()` in the weight's shape, dtype and strides, a new tensor.

    Args, Raises: as in `quantize`.

    Gradient:
        Straight through, the scale a constant: the weight gets the gradient at the quantized weight,
        everywhere.
    """
    quantized = quantize(weight, granularity).dequantize()
    return straight_through(weight, quantized.to(weight.dtype))


def fake_quantize_activation(x: Tensor) -> Tensor:
    """Return the sign of x, -1 or 1, with sign(0) = sign(-0.0) = 1.

    Zero is not a level, yet a convolution sees it: its padding is added after the quantizer and stays 0.

    Args:
        x: float tensor, any shape. nan stays nan.

    Returns:
        x's shape, dtype and strides, a new tensor.

    Gradient:
        dL/dy where |x| <= 1, both ends included, else 0: that of the hard tanh clamp(x, -1, 1).
    """
    return _Sign.apply(x)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, -1).masked_fill_(x >= 0, 1)  # -1 for every number, but nan for nan

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad, 0)
