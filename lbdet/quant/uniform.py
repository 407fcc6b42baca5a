"""Which equally spaced values stand for a number, when the step between them is learned?

Uniform quantization of weights and activations: value = scale * (code - zero_point). The scale is a parameter
that training moves (LSQ); here are its first value, the rounding, and the gradient of both.

    bits  symmetric codes = levels   affine codes   affine levels at scale 1: codes - zero_point
    1     -                          -1 .. 0        0, 1 or -1, 0
    2     -1 .. 1                    -2 .. 1        0 .. 3 or -1 .. 2 or -2 .. 1 or -3 .. 0
    4     -7 .. 7                    -8 .. 7        16 integers, one of them 0
    8     -127 .. 127                -128 .. 127    256 integers, one of them 0

Zero is always a level: an affine zero point is one of the codes, a symmetric one is 0.

Reference:
    Esser, McKinstry, Bablani, Appuswamy, Modha 2020, "Learned step size quantization" (LSQ),
    arXiv 1902.08153.

Differs from the paper:
    A scale starts where the squared error is least (`fit`), not at 2 mean|W| / sqrt(largest code). Symmetric
    codes leave out -2^(bits-1), and there is an affine form. The trained parameter is the scale's logarithm
    (`positive`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lbdet.errors import NumericsError
from lbdet.quant import native
from lbdet.quant.rows import as_rows, check_finite, per_row
from lbdet.quant.ste import sum_to_shape, where_inside

MIN_BITS, MAX_BITS = 2, 8
"""of weights; affine codes, which activations have, start at 1 bit"""

_BLOCK = 1 << 17  # weights whose error is taken at once: temporaries that stay in a core's cache
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class UniformTensor:
    """Numbers as integers: what is stored, and what a kernel needs."""

    codes: Tensor
    """int8, the weight's shape"""
    scale: Tensor
    """float32, `[]` (per tensor) or `[C]` (per channel), positive"""
    zero_point: Tensor
    """int32, the scale's shape: the code that stands for 0; 0 if symmetric"""
    bits: int
    symmetric: bool

    @property
    def levels(self) -> Tensor:
        """The sorted codes as float32."""
        return levels(self.bits, self.symmetric)

    @property
    def level_index(self) -> Tensor:
        """Which of the sorted levels each code stands for, int64, the weight's shape."""
        return self.codes.long() - code_range(self.bits, self.symmetric)[0]

    def dequantize(self) -> Tensor:
        """Return scale * (code - zero_point), float32, the weight's shape, a new tensor."""
        ndim = self.codes.ndim
        steps = self.codes.to(torch.int32) - per_row(self.zero_point, ndim)
        return steps * per_row(self.scale, ndim)


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return the smallest and the largest code.

    Raises:
        ValueError: `bits` is not in 2..8 (symmetric) or 1..8 (affine).

    >>> code_range(4, symmetric=True), code_range(4, symmetric=False)
    ((-7, 7), (-8, 7))
    """
    fewest, form = (MIN_BITS, "") if symmetric else (1, "affine ")
    if not fewest <= bits <= MAX_BITS:
        raise ValueError(f"format 'uniform' has {form}widths {fewest} to {MAX_BITS}, got {bits}")
    high = (1 << (bits - 1)) - 1
    return (-high if symmetric else -high - 1), high


def levels(bits: int, symmetric: bool = True) -> Tensor:
    """Return the sorted codes as float32: the levels at scale 1, before the zero point is subtracted."""
    low, high = code_range(bits, symmetric)
    return torch.arange(low, high + 1, dtype=torch.float32)


def max_scale(weight: Tensor, bits: int, granularity: str = "per_channel") -> Tensor:
    """Return max|W| / largest code, the least symmetric scale at which nothing clips.

    It is rounded up to a float32, except where scale * code would become infinite (max|W| above 3.4028e38).

    Args, Raises: as in `fit`.

    Returns:
        Float32 `[]` or `[C]`, positive, new; 1 where all weights of a row are zero.
    """
    lower, upper = _needed_range(as_rows(weight.detach(), granularity).float(), symmetric=True)
    scale, _ = _scale_of_range(lower, upper, bits, symmetric=True)
    return _one_or_each(scale.masked_fill(scale == 0, 1), granularity)


def fit(
    weight: Tensor, bits: int, granularity: str = "per_channel", symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """Search the scale and the zero point of least squared error, each row for itself.

    The range starts at -max|W| .. max|W| (affine: min(W, 0) .. max(W, 0)). It is clipped to 2^(-1/4),
    2^(-2/4), .. 2^-10 of that (affine: first the upper end, then the lower). Then the best is refined five
    times: scaled by up to three steps of 2^(1/4), then of 2^(1/16), .. 2^(1/1024), a resolution of 0.07 %
    (affine: or moved by a code, at one end or both). The best of these 71 ranges (affine: 141) wins, of
    equals the first, so the error is never above that of `max_scale` (affine: of the unclipped range).

    Args:
        weight: float tensor `[C, ...]`, finite; solved in float32, with small temporaries.
        bits: 2 to 8; affine 1 to 8.
        granularity: "per_tensor", or "per_channel" (one scale for each index of dimension 0).
        symmetric: False for affine.

    Returns:
        The scale, float32, positive, and the zero point, int32, one of the codes (0 if symmetric); both `[]`
        or `[C]`, new. A row of zeros has scale 1 and zero point 0.

    Raises:
        ValueError: an argument out of its range.
        NumericsError: the weight has values that are not finite.
    """
    low, high = code_range(bits, symmetric)
    rows = as_rows(weight.detach(), granularity).float()
    best: tuple[Tensor, ...] = _error_of_range(rows, *_needed_range(rows, symmetric), bits, symmetric)
    for stage in _search_stages(symmetric):
        step, zero_point = best[1].double(), best[2]
        lower, upper = (step * (code - zero_point) for code in (low, high))
        for a, b, i, k in stage:
            candidate = lower * 2.0**a + i * step, upper * 2.0**b + k * step
            tried = _error_of_range(rows, *candidate, bits, symmetric)
            better = tried[0] < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
    scale, zero_point = best[1].masked_fill(best[1] == 0, 1), best[2].to(torch.int32)
    return _one_or_each(scale, granularity), _one_or_each(zero_point, granularity)


def quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool = True
) -> UniformTensor:
    """Find the codes of a weight at a given scale; values out of range clip, ties go to the even level.

    Args:
        weight: float tensor `[C, ...]`, finite; rounded in float32.
        scale: float32 `[]` or `[C]`, positive.
        zero_point: int32, the scale's shape, one of the codes; 0 if symmetric.
        bits: 2 to 8; affine 1 to 8.
        symmetric: False for affine.

    Raises:
        ValueError: `bits` out of its range.
        NumericsError: the weight has values that are not finite, or a scale is not positive and finite.
    """
    low, high = code_range(bits, symmetric)
    check_finite(weight)
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise NumericsError("a scale is not positive and finite")
    scale, zero_point = scale.detach().to(torch.float32, copy=True), zero_point.to(torch.int32, copy=True)
    zero = per_row(zero_point, weight.ndim)
    steps = (weight.detach().float() / per_row(scale, weight.ndim)).round_()
    codes = _clamp_(steps, low - zero, high - zero).add_(zero).to(torch.int8)
    return UniformTensor(codes, scale, zero_point, bits, symmetric)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: int | Tensor,
    high: int | Tensor,
    gradient_scale: float | Tensor = 1.0,
) -> Tensor:
    """Return scale * clamp(round(x / scale), low, high); ties go to the even level.

    `low` and `high` are codes minus the zero point, so that 0 is a level: -7 and 7 for symmetric 4 bits.

    Args:
        x: float tensor of any shape and strides; half types are calculated in float32.
        scale: float32, positive, `[]` or broadcastable to `x` (`[C, 1, 1, 1]` for a weight).
        low: integers <= 0; a tensor must be broadcastable to `x`.
        high: integers >= 0, likewise.
        gradient_scale: factor on the gradient of the scale, see `lsq_gradient_scale`; a tensor must be
            broadcastable to the scale.

    Returns:
        The shape, dtype and memory format of `x`, a new tensor.

    Gradient:
        "Inside" means low <= x / scale <= high; y is the result.
        x, straight through: dL/dx = dL/dy inside, 0 outside.
        scale: gradient_scale * the sum, over the elements that share the scale, of
        dL/dy * (round(x / scale) - x / scale) inside, dL/dy * low below, dL/dy * high above.

    Reference:
        Esser et al. 2020 (LSQ), arXiv 1902.08153, section 2.
    """
    return _FakeQuantize.apply(x, scale, low, high, gradient_scale, False)


def fake_quantize_learned(
    x: Tensor, log_scale: Tensor, low: int | Tensor, high: int | Tensor, gradient_scale: float | Tensor
) -> Tensor:
    """Return `fake_quantize` at the scale `positive(log_scale)`, with its values and gradients, in one step.

    Args:
        log_scale: float32 `[]`, or `[C]` for `x` of shape `[C, ...]`.
        x, low, high, gradient_scale: as in `fake_quantize`.
    """
    return _FakeQuantize.apply(x, log_scale, low, high, gradient_scale, True)


def lsq_gradient_scale(elements: int, high: int | Tensor) -> float | Tensor:
    """Return 1 / sqrt(elements * high), the paper's factor on the gradient of a scale.

    With it the scale's updates are, relative to the scale, about as large as those of the weights to theirs.

    Args:
        elements: how many numbers share the scale, at least 1.
        high: the largest code minus the zero point; below 1 it counts as 1. A tensor where scales have zero
            points of their own.
    """
    if isinstance(high, Tensor):
        return 1 / (elements * high.clamp_min(1).double()).sqrt()
    return 1 / math.sqrt(elements * max(high, 1))


def positive(log_scale: Tensor) -> Tensor:
    """Return exp(log_scale), a scale whose logarithm is trained, with a gradient of its own.

    The parameter is the logarithm so that the scale stays positive, and so that an update by Adam, whose size
    does not depend on the gradient's, changes the scale by a share of itself, whatever its magnitude (the
    argument of TQT).

    Gradient:
        dL/dlog_scale := dL/dscale / scale, where the chain rule says times scale. With it, an update of the
        logarithm by SGD changes the scale, to first order, exactly as LSQ's own parameter, the scale itself:
        d scale = scale * d log = scale * (-lr * dL/dscale / scale) = -lr * dL/dscale.

    Reference:
        Jain, Gural, Wu, Dick 2019, "Trained quantization thresholds" (TQT), arXiv 1903.08066.

    Differs from the paper:
        TQT trains log2 of the clip, rounds the scale up to a power of two and follows the chain rule.
    """
    return _Positive.apply(log_scale)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: int | Tensor,
        high: int | Tensor,
        factor: float | Tensor,
        is_log: bool,
    ) -> Tensor:
        ctx.low, ctx.high, ctx.factor, ctx.is_log, ctx.shape = low, high, factor, is_log, scale.shape
        if is_log:
            scale = per_row(scale.exp(), x.ndim)
        ctx.save_for_backward(x, scale)
        y = native.round_rows(x, scale, low, high)
        return _rounded(x, scale, low, high) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, scale = ctx.saved_tensors
        grad_x, slope = native.round_gradients(grad, x, scale, ctx.low, ctx.high) or _gradients(
            grad, x, scale, ctx.low, ctx.high, ctx.needs_input_grad[1]
        )
        if slope is not None:
            slope = slope.mul_(ctx.factor).to(scale.dtype)
            slope = (slope.div_(scale) if ctx.is_log else slope).view(ctx.shape)
        return grad_x if ctx.needs_input_grad[0] else None, slope, None, None, None, None


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return grad / scale


def _rounded(x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Return the result of `fake_quantize`."""
    return _clamp_(_divide(x, scale).round_(), low, high).mul_(scale).to(x.dtype)


def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: int | Tensor, high: int | Tensor, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of x, and where it is learned that of the scale, before `gradient_scale`."""
    steps = _divide(x, scale)
    wide = grad.to(steps.dtype)
    grad_x = where_inside(wide, steps, low, high)
    if not learned:
        return grad_x.to(x.dtype), None
    level = _clamp_(steps, low, high)  # inside these are still the steps
    inside = level.round().sub_(level).mul_(wide)
    slopes = inside.addcmul_(wide - grad_x, level)  # of the two terms one is zero
    return grad_x.to(x.dtype), sum_to_shape(slopes, scale.shape)


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale, a new tensor, never of a half type."""
    return x.float().div_(scale) if x.dtype in (torch.float16, torch.bfloat16) else x / scale


def _clamp_(x: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Clamp in place; for tensors that broadcast, `Tensor.clamp_` is several times slower than two passes."""
    if isinstance(low, int) and isinstance(high, int):
        return x.clamp_(low, high)
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


def _needed_range(rows: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the ends of the range in which all of a row lies, float64 `[R, 1]` each."""
    lower, upper = (end.double() for end in torch.aminmax(rows, dim=-1, keepdim=True))
    check_finite(upper - lower)
    largest = torch.maximum(-lower, upper)
    return (-largest, largest) if symmetric else (lower, upper)


def _search_stages(symmetric: bool) -> list[list[tuple[float, float, int, int]]]:
    """Return the moves of `fit`: (a, b, i, k) multiplies the ends by 2^a, 2^b, shifts them by i, k steps."""
    clips = [-j / 4 for j in range(1, 41)]
    if symmetric:
        clipping, shifts = [[(a, a, 0, 0) for a in clips]], []
    else:
        clipping = [[(0, b, 0, 0) for b in clips], [(a, 0, 0, 0) for a in clips]]
        shifts = [(0, 0, i, k) for i, k in ((-1, -1), (1, 1), (-1, 0), (1, 0), (0, -1), (0, 1))]
    scaling = [[(j / n, j / n, 0, 0) for j in (-3, -2, -1, 1, 2, 3)] for n in (4, 16, 64, 256, 1024)]
    return clipping + [scales + shifts for scales in scaling]


def _error_of_range(
    rows: Tensor, lower: Tensor, upper: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a range's squared error (nan if it is empty), scale and zero point, `[R, 1]` each."""
    scale, zero_point = _scale_of_range(lower, upper, bits, symmetric)
    low, high = code_range(bits, symmetric)
    return _squared_error(rows, scale, low - zero_point, high - zero_point), scale, zero_point


def _scale_of_range(lower: Tensor, upper: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale, rounded up, and the zero point (0 and 0 of an empty range), float32 `[R, 1]`.

    0 is added to the range where it lies outside.
    """
    low, high = code_range(bits, symmetric)
    exact = (upper.clamp_min(0) - lower.clamp_max(0)) / (high - low)
    zero_point = torch.zeros_like(exact) if symmetric else (low - (lower / exact).round()).clamp(low, high)
    zero_point = zero_point.masked_fill(exact == 0, 0).float()
    scale = exact.float()
    scale = torch.where(scale < exact, scale.nextafter(torch.full_like(scale, math.inf)), scale)
    largest_level = torch.maximum(high - zero_point, zero_point - low)
    return scale.minimum(_FLOAT32_MAX * (1 - 2.0**-22) / largest_level), zero_point  # no level is infinite


def _squared_error(rows: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return ||w - s * clamp(round(w / s), low, high)||^2 of each row, float64 `[R, 1]`."""
    errors, rows_each = [], max(1, _BLOCK // rows.shape[1])
    for w, s, lo, hi in zip(*(t.split(rows_each) for t in (rows, scale, low, high)), strict=True):
        steps = (part / s for part in w.split(_BLOCK, dim=1))
        squares = (v.sub_(_clamp_(v.round(), lo, hi)).square_() for v in steps)
        errors.append(sum(square.sum(-1, keepdim=True).double() for square in squares))
    return torch.cat(errors) * scale.double().square()


def _one_or_each(values: Tensor, granularity: str) -> Tensor:
    """Shape `[R, 1]` as `[]` (per_tensor) or `[C]` (per_channel)."""
    return values.flatten() if granularity == "per_channel" else values[0, 0]
