"""Which equally spaced values stand for a weight?

Symmetric uniform quantization, the range taken from the weights.

    bits  codes         levels at scale 1
    2     -1 .. 1       -1, 0, 1
    4     -7 .. 7       -7, ..., -1, 0, 1, ..., 7
    8     -127 .. 127   -127, ..., 127

The scale is max|W| / (2^(bits-1) - 1), so the largest weight is a level and nothing clips;
-2^(bits-1) is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbdet.errors import NumericsError
from lbdet.quant.rows import as_rows, per_row
from lbdet.quant.ste import straight_through

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class UniformTensor:
    """Weights as integers."""

    codes: Tensor
    """int8, the weight's shape"""
    scale: Tensor
    """float32, `[]` (per tensor) or `[C]` (per channel); 1 where all weights are zero"""
    bits: int

    def dequantize(self) -> Tensor:
        """Return scale * code, float32, the weight's shape, a new tensor."""
        return self.codes * per_row(self.scale, self.codes.ndim)


def largest_code(bits: int) -> int:
    """Return 2^(bits-1) - 1.

    Raises:
        ValueError: `bits` is not in 2..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"format 'uniform' has widths {MIN_BITS} to {MAX_BITS}, got {bits}")
    return (1 << (bits - 1)) - 1


def levels(bits: int) -> Tensor:
    """Return the sorted representable values at scale 1, float32 `[2^bits - 1]`."""
    return torch.arange(-largest_code(bits), largest_code(bits) + 1, dtype=torch.float32)


def quantize(weight: Tensor, bits: int, granularity: str = "per_channel") -> UniformTensor:
    """Find the codes and scales of a weight `[C, ...]`; ties round to the even code.

    Raises:
        ValueError: an argument out of its range.
        NumericsError: the weight has values that are not finite.
    """
    rows = as_rows(weight, granularity).float()
    largest = rows.abs().amax(-1)
    if not bool(torch.isfinite(largest).all()):
        raise NumericsError("a weight has values that are not finite")
    scale = largest / largest_code(bits)
    scale = torch.where(scale > 0, scale, 1.0)
    scale = scale if granularity == "per_channel" else scale[0]
    codes = (weight.float() / per_row(scale, weight.ndim)).round()
    codes = codes.clamp(-largest_code(bits), largest_code(bits)).to(torch.int8)
    return UniformTensor(codes, scale, bits)


def fake_quantize(weight: Tensor, bits: int, granularity: str = "per_channel") -> Tensor:
    """Return the nearest representable weights, in the weight's shape, dtype and strides.

    Gradient:
        Straight through: the weight gets the gradient at the quantized weight, everywhere.
    """
    quantized = quantize(weight.detach(), bits, granularity).dequantize()
    return straight_through(weight, quantized.to(weight.dtype))
