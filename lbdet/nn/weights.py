"""Weight quantizers as modules: a number format, how its levels are found, and the parameters it learns.

A quantizer knows no width: the layer passes the bits of the moment, so that a schedule can change them in
place. A format whose parameters depend on the width holds one set a width, started when the width is first
selected.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lbdet.quant import binary, dorefa, lbw, learned_levels, uniform
from lbdet.quant.rows import as_rows, check_granularity, per_row
from lbdet.quant.ste import straight_through


class Quantized(Protocol):
    """Stored weights: integer codes and the way back."""

    @property
    def codes(self) -> Tensor:
        """int8, the weight's shape."""
        ...

    @property
    def levels(self) -> Tensor:
        """The sorted representable values, float32: at scale 1, or as they are where levels are learned."""
        ...

    @property
    def level_index(self) -> Tensor:
        """Which of the sorted levels each code stands for, int64, the weight's shape."""
        ...

    def dequantize(self) -> Tensor:
        """Return float32 values, the weight's shape."""
        ...


def scales(weight: Tensor, granularity: str) -> int:
    """Return how many scales a weight `[C, ...]` has."""
    return 1 if granularity == "per_tensor" else weight.shape[0]


class WeightQuantizer(nn.Module):
    """What a layer asks of the number format of its weights."""

    format: ClassVar[str]
    widths: ClassVar[range]
    granularity: str
    solver: str
    """how scale or levels are found"""

    def started(self, bits: int) -> bool:
        """Return whether the parameters of a width exist; true for a format without parameters."""
        return True

    def start(self, weight: Tensor, bits: int) -> None:
        """Set the parameters of a width from the weight `[C, ...]`; make them where there are none yet.

        Values change in place, so an optimizer keeps its hold on them.
        """
        return

    def settle(self, weight: Tensor, bits: int) -> None:
        """Restore, in place, what an optimizer's update may have broken: the order of levels, a scale."""
        return

    @abstractmethod
    def forward(self, weight: Tensor, bits: int) -> Tensor:
        """Return the representable weights that stand for `weight`, with the format's gradient."""

    @abstractmethod
    def quantize(self, weight: Tensor, bits: int) -> Quantized:
        """Return what would be stored; dequantized it equals `forward`."""

    @abstractmethod
    def stored_bits(self, weight: Tensor, bits: int) -> int:
        """Return the size of codes, scales and levels, in bits."""


class LbwWeight(WeightQuantizer):
    """Powers of two and zero, see `lbdet.quant.lbw`; the arguments are those of `lbw.quantize`."""

    format = "lbw"
    widths = range(lbw.MIN_BITS, lbw.MAX_BITS + 1)

    def __init__(self, solver: str = "exact", granularity: str = "per_channel", ratio: float = 0.75) -> None:
        super().__init__()
        lbw.check_options(solver, granularity, ratio)
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


class UniformWeight(WeightQuantizer):
    """Equally spaced values, see `lbdet.quant.uniform`.

    Args:
        scale: "learned" trains it, from the one of least squared error; "max" is max|W| over the largest code
            at every step, so that nothing clips.
        symmetric: -Q .. Q; otherwise one more level, and an integer zero point that stays as it was fitted.
    """

    format = "uniform"
    widths = range(uniform.MIN_BITS, uniform.MAX_BITS + 1)

    def __init__(
        self, granularity: str = "per_channel", scale: str = "learned", symmetric: bool = True
    ) -> None:
        super().__init__()
        if scale not in ("learned", "max"):
            raise ValueError(f"scale must be 'learned' or 'max', got {scale!r}")
        if scale == "max" and not symmetric:
            raise ValueError("scale 'max' is symmetric, got symmetric: false; use scale 'learned'")
        check_granularity(granularity)
        self.granularity, self.solver, self.symmetric = granularity, scale, symmetric

    def started(self, bits: int) -> bool:
        return self.solver == "max" or f"log_scale_{bits}" in self._parameters

    @torch.no_grad()
    def start(self, weight: Tensor, bits: int) -> None:
        if self.solver == "max":
            return
        scale, zero_point = uniform.fit(weight, bits, self.granularity, self.symmetric)
        _set_parameter(self, f"log_scale_{bits}", scale.log())
        if not self.symmetric:
            _set_buffer(self, f"zero_point_{bits}", zero_point)

    @torch.no_grad()
    def settle(self, weight: Tensor, bits: int) -> None:
        """Keep each scale where weights can use it: not above the largest of a row, which would all become 0,
        nor below 1/1024 of what clips nothing. A large step of SGD would lose it for good.
        """
        if self.solver == "max":
            return
        log_scale = self.get_parameter(f"log_scale_{bits}")
        largest = as_rows(weight, self.granularity).abs().amax(-1).view_as(log_scale).log()
        lowest = largest - math.log(1024 * uniform.code_range(bits, True)[1])
        log_scale.copy_(torch.where(largest.isfinite(), log_scale.clamp(lowest, largest), log_scale))

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        if self.solver == "max":
            return straight_through(weight, self.quantize(weight, bits).dequantize().to(weight.dtype))
        low, high = uniform.code_range(bits, self.symmetric)
        log_scale = self.get_parameter(f"log_scale_{bits}")
        if not self.symmetric:
            zero_point = per_row(self.get_buffer(f"zero_point_{bits}"), weight.ndim)
            low, high = low - zero_point, high - zero_point
        gradient_scale = uniform.lsq_gradient_scale(weight.numel() // max(log_scale.numel(), 1), high)
        return uniform.fake_quantize_learned(weight, log_scale, low, high, gradient_scale)

    @torch.no_grad()
    def quantize(self, weight: Tensor, bits: int) -> uniform.UniformTensor:
        if self.solver == "max":
            scale = uniform.max_scale(weight, bits, self.granularity)
        else:
            scale = self.get_parameter(f"log_scale_{bits}").exp()
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        if not self.symmetric:
            zero_point = self.get_buffer(f"zero_point_{bits}")
        return uniform.quantize(weight, scale, zero_point, bits, self.symmetric)

    def stored_bits(self, weight: Tensor, bits: int) -> int:
        """Return the size of the codes, one float32 a scale and one byte a zero point, in bits."""
        return weight.numel() * bits + (32 if self.symmetric else 40) * scales(weight, self.granularity)

    def extra_repr(self) -> str:
        return f"granularity={self.granularity!r}, scale={self.solver!r}, symmetric={self.symmetric}"


class DorefaWeight(WeightQuantizer):
    """Equally spaced values of tanh(w), one scale a tensor, see `lbdet.quant.dorefa`."""

    format = "dorefa"
    widths = range(dorefa.MIN_BITS, dorefa.MAX_BITS + 1)
    granularity = "per_tensor"
    solver = "max"

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        return dorefa.fake_quantize(weight, bits)

    def quantize(self, weight: Tensor, bits: int) -> dorefa.DorefaTensor:
        return dorefa.quantize(weight, bits)

    def stored_bits(self, weight: Tensor, bits: int) -> int:
        """Return the size of the codes and one float32, in bits."""
        return weight.numel() * bits + 32


class BinaryWeight(WeightQuantizer):
    """Sign times mean magnitude, see `lbdet.quant.binary`."""

    format = "binary"
    widths = range(1, 2)
    solver = "mean"

    def __init__(self, granularity: str = "per_channel") -> None:
        super().__init__()
        check_granularity(granularity)
        self.granularity = granularity

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        return binary.fake_quantize(weight, self.granularity)

    def quantize(self, weight: Tensor, bits: int) -> binary.BinaryTensor:
        return binary.quantize(weight, self.granularity)

    def stored_bits(self, weight: Tensor, bits: int) -> int:
        """Return the size of the signs and one float32 a scale, in bits."""
        return weight.numel() + 32 * scales(weight, self.granularity)

    def extra_repr(self) -> str:
        return f"granularity={self.granularity!r}"


class LearnedLevelsWeight(WeightQuantizer):
    """2^bits values that are trained, see `lbdet.quant.learned_levels`.

    Args:
        symmetric: levels are pairs -l, l.
    """

    format = "learned_levels"
    widths = range(learned_levels.MIN_BITS, learned_levels.MAX_BITS + 1)
    solver = "learned"

    def __init__(self, granularity: str = "per_tensor", symmetric: bool = False) -> None:
        super().__init__()
        check_granularity(granularity)
        self.granularity, self.symmetric = granularity, symmetric

    def started(self, bits: int) -> bool:
        return f"levels_{bits}" in self._parameters

    @torch.no_grad()
    def start(self, weight: Tensor, bits: int) -> None:
        table = learned_levels.lloyd_max(weight, bits, self.granularity, self.symmetric)
        _set_parameter(self, f"levels_{bits}", self._stored(table))

    @torch.no_grad()
    def settle(self, weight: Tensor, bits: int) -> None:
        settled, table = learned_levels.settle(weight, self._table(bits), self.symmetric)
        weight.copy_(settled)
        self.get_parameter(f"levels_{bits}").copy_(self._stored(table))

    def forward(self, weight: Tensor, bits: int) -> Tensor:
        return learned_levels.fake_quantize(weight, self._table(bits))

    @torch.no_grad()
    def quantize(self, weight: Tensor, bits: int) -> learned_levels.LevelsTensor:
        return learned_levels.quantize(weight, self._table(bits), bits)

    def stored_bits(self, weight: Tensor, bits: int) -> int:
        """Return the size of the codes and the levels as float32, in bits."""
        levels = 1 << (bits - 1 if self.symmetric else bits)
        return weight.numel() * bits + 32 * levels * scales(weight, self.granularity)

    def extra_repr(self) -> str:
        return f"granularity={self.granularity!r}, symmetric={self.symmetric}"

    def _table(self, bits: int) -> Tensor:
        levels = self.get_parameter(f"levels_{bits}")
        return learned_levels.mirror(levels) if self.symmetric else levels

    def _stored(self, table: Tensor) -> Tensor:
        """Return what the parameter holds: the upper half of symmetric levels."""
        return table[:, table.shape[1] // 2 :] if self.symmetric else table


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module.get_parameter(name).copy_(value)
    else:
        module.register_parameter(name, nn.Parameter(value.clone()))


def _set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._buffers:
        module.get_buffer(name).copy_(value)
    else:
        module.register_buffer(name, value.clone())
