"""Which equally spaced values stand for a weight squeezed by tanh, or for an activation clipped to [0, clip]?

DoReFa weights: w -> tanh(w), scaled into [0, 1], rounded to one of 2^k equal steps and scaled back. Zero is
not a level (their number is even): a zero weight becomes m / (2^k - 1), and -m at 1 bit.

    bits k  codes        levels at scale 1
    1       -1 .. 0      -1, 1
    2       -2 .. 1      -1, -1/3, 1/3, 1
    4       -8 .. 7      -1, -13/15, ..., -1/15, 1/15, ..., 13/15, 1
    8       -128 .. 127  -1, -253/255, ..., 253/255, 1               level = (2 code + 1) / (2^k - 1)

Activations have the 2^k values clip * (0, 1, ..., 2^k - 1) / (2^k - 1), so zero is one of them. DoReFa
fixes clip at 1, PACT learns it. All rounding is half to even, as `torch.round` does.

Reference:
    Zhou et al. 2016, "DoReFa-Net", arXiv 1606.06160; the quantizer of Zhuang et al. 2018, arXiv 1711.00205,
    and 2022, arXiv 1908.04680. Clip: Choi et al. 2018, "PACT", arXiv 1805.06085.

Differs from the paper:
    Weights are multiplied back by m = max|tanh w|; the paper leaves them in [-1, 1]. In front of a batch norm
    in training mode this changes nothing, up to its eps: batch norm divides m away, and the gradient to w is
    the same (the gradient at weights in [-1, 1] is m times ours, and is divided by m on its way to w).
    Elsewhere (heads, frozen or pretrained batch norm) the factor is needed.
    m is a constant in the backward pass; the paper differentiates it too.
    The formula holds for 1 bit as well, where the paper binarises with sign(w) * mean|w| (see `binary`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbdet.quant import native
from lbdet.quant.rows import check_finite
from lbdet.quant.ste import straight_through, sum_to_shape, where_at_least, where_inside

MIN_BITS, MAX_BITS = 1, 8


@dataclass(frozen=True)
class DorefaTensor:
    """Weights as integers."""

    codes: Tensor
    """int8, the weight's shape: round((2^k - 1) t) - 2^(k-1), see `quantize`"""
    scale: Tensor
    """float32 `[]`: m = max|tanh w|, 0 where all weights are zero"""
    bits: int

    @property
    def levels(self) -> Tensor:
        """The sorted representable values at scale 1, float32 `[2^bits]`."""
        return levels(self.bits)

    @property
    def level_index(self) -> Tensor:
        """Which of the sorted levels each code stands for, int64, the weight's shape."""
        return self.codes.long() + (_steps(self.bits) + 1) // 2

    def dequantize(self) -> Tensor:
        """Return scale * level, float32, the weight's shape, a new tensor."""
        return _level(self.codes.float(), self.bits).mul_(self.scale)


def levels(bits: int) -> Tensor:
    """Return the sorted representable values at scale 1, float32 `[2^bits]`, from -1 to 1.

    >>> levels(2)
    tensor([-1.0000, -0.3333,  0.3333,  1.0000])

    Raises:
        ValueError: `bits` is not in 1..8.
    """
    half = (_steps(bits) + 1) // 2
    return _level(torch.arange(-half, half, dtype=torch.float32), bits)


def quantize(weight: Tensor, bits: int) -> DorefaTensor:
    """Find the codes and the scale of a weight: t = tanh(w) / (2 m) + 1/2 in [0, 1], rounded to equal steps.

    The result stands for tanh(w), not for w: large weights are squeezed towards 1, and a second `quantize`
    squeezes again.

    Args:
        weight: float tensor, any shape, finite; half types are computed in float32.
        bits: 1 to 8.

    Returns:
        A `DorefaTensor`, new. An all-zero weight has scale 0 and dequantizes to zeros.

    Raises:
        ValueError: `bits` out of its range.
        NumericsError: the weight has values that are not finite.
    """
    codes, m = _codes(_tanh(weight.detach()), bits)
    return DorefaTensor(codes.to(torch.int8), m.float(), bits)


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """Return `quantize(...).dequantize()` without the codes in between (float64 weights: in float64).

    Args, Raises: as in `quantize`.

    Returns:
        The weight's shape, dtype and strides, a new tensor.

    Gradient:
        Straight through the rounding, true through tanh, m a constant: dL/dw = dL/dwq * (1 - tanh(w)^2). So a
        weight beyond about +-9 gets none in float32 and stays where it is.
    """
    tanh = _tanh(weight)
    codes, m = _codes(tanh.detach(), bits)
    return straight_through(tanh, _level(codes, bits).mul_(m)).to(weight.dtype)


def fake_quantize_activation(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Return clip * round((2^bits - 1) * clamp(x / clip, 0, 1)) / (2^bits - 1); negative inputs become 0.

    Args:
        x: float tensor, any shape; half types are computed in float32. nan stays nan.
        clip: float32 `[]` on x's device, positive: 1 for DoReFa, a parameter for PACT. Not checked here,
            as looking at it would wait for the device: whoever trains it keeps it positive.
        bits: 1 to 8.

    Returns:
        x's shape, dtype and strides, a new tensor: whole numbers times clip / (2^bits - 1).

    Raises:
        ValueError: `bits` out of its range.

    Gradient:
        To x: dL/dy where 0 <= x / clip <= 1, both ends included, else 0.
        To clip: the sum of dL/dy where x / clip >= 1. At x = clip both get it. Below clip the rounded value
        depends on clip too; PACT ignores that.
    """
    return _ClippedRound.apply(x, clip, _steps(bits))


class _ClippedRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(x, clip)
        step = clip.to(torch.promote_types(x.dtype, torch.float32)) / steps
        y = native.round_rows(x, step, 0, steps)
        return _rounded(x, step, steps) if y is None else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, clip = ctx.saved_tensors
        grad_x, slope = native.clip_gradients(grad, x, clip) or _gradients(
            grad, x, clip, ctx.needs_input_grad[1]
        )
        grad_clip = None if slope is None else slope.to(clip.dtype)
        return grad_x if ctx.needs_input_grad[0] else None, grad_clip, None


def _rounded(x: Tensor, step: Tensor, steps: int) -> Tensor:
    """Return step * round(clamp(x / step, 0, steps)): one division and product, as int8 inference does it."""
    return (_at_least_float32(x) / step).clamp_(0, steps).round_().mul_(step).to(x.dtype)


def _gradients(grad: Tensor, x: Tensor, clip: Tensor, learned: bool) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of x, and where it is learned that of the clip."""
    share = _at_least_float32(x) / clip  # compared in bfloat16, clip itself would be rounded
    wide = grad.to(share.dtype)
    slope = sum_to_shape(where_at_least(wide, share, 1), clip.shape) if learned else None
    return where_inside(wide, share, 0, 1).to(grad.dtype), slope


def _steps(bits: int) -> int:
    """Return 2^bits - 1, the number of equal steps between the lowest and the highest level."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"format 'dorefa' has widths {MIN_BITS} to {MAX_BITS}, got {bits}")
    return (1 << bits) - 1


def _tanh(weight: Tensor) -> Tensor:
    """Return tanh(w) in float32 or float64; checked before, as tanh hides infinity."""
    check_finite(weight)
    return _at_least_float32(weight).tanh()


def _codes(tanh: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes as floats, and m."""
    steps = _steps(bits)
    m = tanh.abs().amax()
    t = tanh / (2 * torch.where(m > 0, m, 1)) + 0.5
    return t.mul_(steps).round_().sub_((steps + 1) // 2), m


def _level(codes: Tensor, bits: int) -> Tensor:
    """Return (2 code + 1) / (2^bits - 1) of codes stored as floats, a new tensor."""
    return (2 * codes + 1).div_(_steps(bits))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
