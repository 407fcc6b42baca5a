"""How does a layer's weight become int8 codes and one float32 scale an output channel?

An integer engine computes with value = scale * code. What the codes of each format become:

    format          width  stored code       integer code                  scale
    lbw             2..4   +-(k+1), 0        +-2^(n-1-k), 0: -8 .. 8       2^(s-n+1)
    uniform         2..8   -127 .. 127       code - zero point             scale
    dorefa          1..7   c                 2 c + 1: -127 .. 127          m / (2^bits - 1)
    binary          1      -1, 1             -1, 1                         mean|W|

They are exact: dequantized they are the weights that training used (dorefa: up to the last bit of a float32).
What has no such integers: LBW of 5 and 6 bits, whose largest code is 2^7 or 2^15; DoReFa of 8 bits, with 256
odd codes; affine 8-bit codes whose zero point takes them beyond 127; and learned levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lbdet.errors import UserError
from lbdet.nn import QuantLayer
from lbdet.quant.binary import BinaryTensor
from lbdet.quant.dorefa import DorefaTensor
from lbdet.quant.lbw import LBWTensor, magnitudes
from lbdet.quant.pow2 import pow2
from lbdet.quant.rows import per_row
from lbdet.quant.uniform import UniformTensor

LARGEST = 127
"""of the codes: -128 has no negative"""


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as an integer engine stores it."""

    codes: Tensor
    """int8 `[C, ...]`, in -127..127"""
    scale: Tensor
    """float32 `[C]`, positive"""

    def dequantize(self) -> Tensor:
        """Return scale * code, float32 `[C, ...]`, a new tensor."""
        return self.codes * per_row(self.scale, self.codes.ndim)


@torch.no_grad()
def integer_weight(name: str, layer: QuantLayer) -> IntegerWeight:
    """Return the weight of a layer at its present width.

    Args:
        name: of the layer, for messages.
        layer: with weight bits.

    Raises:
        UserError: the format has no integers at this width, or they do not fit int8.
    """
    bits, quantizer = layer.precision.weight_bits, layer.weight_quantizer
    assert bits is not None
    what = f"{name}: {bits}-bit weights of format {quantizer.format!r}"
    remedy = "train it in another width or format, or export such weights as float32 (--float-weights)"
    stored = quantizer.quantize(layer.weight, bits)
    found = _FORMATS[type(stored)](stored) if type(stored) in _FORMATS else None
    if found is None:
        raise UserError(f"{what} are not equally spaced, so int8 has no codes for them; {remedy}")
    integers, scale = found
    largest = int(integers.abs().max()) if integers.numel() else 0
    if largest > LARGEST:
        raise UserError(f"{what} must have codes up to {LARGEST} for int8, got {largest}; {remedy}")
    scale = scale.float().expand(layer.weight.shape[0])
    usable = (scale > 0) & scale.isfinite()
    codes = integers * per_row(usable, integers.ndim)
    return IntegerWeight(codes.to(torch.int8).contiguous(), torch.where(usable, scale, 1).contiguous())


def _lbw(stored: LBWTensor) -> tuple[Tensor, Tensor]:
    n, codes = magnitudes(stored.bits), stored.codes.to(torch.int32)
    steps = (n - codes.abs()).clamp_min(0)  # -1 for the code 0, whose sign is 0
    return codes.sign() * (1 << steps), pow2(stored.scale_exponent - n + 1)


def _uniform(stored: UniformTensor) -> tuple[Tensor, Tensor]:
    codes = stored.codes.to(torch.int32)
    return codes - per_row(stored.zero_point, codes.ndim), stored.scale


def _dorefa(stored: DorefaTensor) -> tuple[Tensor, Tensor]:
    return 2 * stored.codes.to(torch.int32) + 1, stored.scale / ((1 << stored.bits) - 1)


def _binary(stored: BinaryTensor) -> tuple[Tensor, Tensor]:
    return stored.codes.to(torch.int32), stored.scale


_FORMATS: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {
    LBWTensor: _lbw,
    UniformTensor: _uniform,
    DorefaTensor: _dorefa,
    BinaryTensor: _binary,
}
