"""Weight quantizers as modules: a number format, how its scale is found, and nothing else.

A quantizer knows no width: the layer passes the bits of the moment, so that a schedule can change them in
place. A format whose parameters depend on the width will hold one set a width; these two have none.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn

from lbdet.quant import lbw, uniform


class Quantized(Protocol):
    """Stored weights: integer codes and the way back."""

    @property
    def codes(self) -> Tensor:
        """int8, the weight's shape."""
        ...

    def dequantize(self) -> Tensor:
        """Return float32 values, the weight's shape."""
        ...


def scales(weight: Tensor, granularity: str) -> int:
    """Return how many scales a weight `[C, ...]` has."""
    return 1 if granularity == "per_tensor" else weight.shape[0]


class LbwWeight(nn.Module):
    """Powers of two and zero, see `lbdet.quant.lbw`; the arguments are those of `lbw.quantize`."""

    format = "lbw"
    widths: ClassVar[range] = range(lbw.MIN_BITS, lbw.MAX_BITS + 1)

    def __init__(self, solver: str = "exact", granularity: str = "per_channel", ratio: float = 0.75) -> None:
        super().__init__()
        self.solver, self.granularity, self.ratio = solver, granularity, ratio

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        return lbw.fake_quantize(weight, bits, self.solver, self.granularity, self.ratio)

    def quantize(self, weight: Tensor, bits: int) -> lbw.LBWTensor:
        return lbw.quantize(weight, bits, self.solver, self.granularity, self.ratio)

    def stored_bits(self, weight: Tensor, bits: int) -> int:
        """Return the size of the radix-packed codes and one byte a scale exponent, in bits."""
        codes, group_bits = lbw.RADIX_PACKING[bits]
        return -(-weight.numel() // codes) * group_bits + 8 * scales(weight, self.granularity)

    def extra_repr(self) -> str:
        ratio = f", ratio={self.ratio}" if self.solver == "semi" else ""
        return f"solver={self.solver!r}, granularity={self.granularity!r}{ratio}"


class UniformWeight(nn.Module):
    """Equally spaced values, see `lbdet.quant.uniform`."""

    format = "uniform"
    solver = "max"
    widths: ClassVar[range] = range(uniform.MIN_BITS, uniform.MAX_BITS + 1)

    def __init__(self, granularity: str = "per_channel") -> None:
        super().__init__()
        self.granularity = granularity

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        return uniform.fake_quantize(weight, bits, self.granularity)

    def quantize(self, weight: Tensor, bits: int) -> uniform.UniformTensor:
        return uniform.quantize(weight, bits, self.granularity)

    def stored_bits(self, weight: Tensor, bits: int) -> int:
        """Return the size of the codes and one float32 a scale, in bits."""
        return weight.numel() * bits + 32 * scales(weight, self.granularity)

    def extra_repr(self) -> str:
        return f"granularity={self.granularity!r}"


WeightQuantizer = LbwWeight | UniformWeight
