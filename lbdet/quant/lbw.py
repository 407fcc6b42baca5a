"""Which powers of two stand for a weight best?

LBW: weights 2^s * Q, the least-squares problem solved exactly.

`Q` is 0 or +-2^-k for k = 0 .. n-1, with `n = 2^(bits-2)` magnitudes;
`s` is an integer, one a tensor or one a row.

    bits  n   levels at scale 1 (positive half)        symbols
    2     1   0                           1            3
    3     2   0                     1/2   1            5
    4     4   0         1/8   1/4   1/2   1            9
    5     8   0  1/128 ...                1            17
    6     16  0  2^-15 ...                1            33

One level an octave leaves a relative squared error of 3.8 % on Gaussian weights however many octaves there
are: six bits buy nothing over five, and wider than six is refused.

The exact solver. For fixed s the best Q is the nearest level, so only s is searched. Going down from
s to s-1, the top level 2^s disappears and a new lowest one, p = 2^(s-n), appears; all other levels
are common to both. So the error changes by two sums of simple functions of |w|, a ramp (values that
must now clip) and a tent (values near p):

    E(s-1) - E(s) = 2^s * sum relu(|w| - 3/4 * 2^s)  -  2p * sum relu(p/2 - ||w| - p|)

The search starts where nothing clips, s0 = log2 of the power of two nearest to max|w| (above it the first sum
is 0, so no larger s is better) or at 127, the largest s of a float32. It stops for a row when what further
tents can still gain, at most N * p^2 / 4, cannot reach the best error any more. Every term of both sums is
exact in float32 and they are added in float64.

Reference:
    Yin, Zhang, Qi, Xin 2016, "Quantization and training of low bit-width convolutional neural networks for
    object detection" (LBW-Net), arXiv 1612.06052.

Differs from the paper:
    "exact" solves the problem for every width; the paper has an exact formula for 2 bits, by sorting, and
    a semi-analytical rule above (`solver="semi"`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbdet.quant import native
from lbdet.quant.pow2 import exponent, nearest_pow2, pow2
from lbdet.quant.rows import as_rows, check_finite, check_granularity, per_row
from lbdet.quant.ste import straight_through

MIN_BITS, MAX_BITS = 2, 6
_MAX_EXPONENT = 127  # of a float32: weights above 1.5 * 2^127 clip, as 2^128 is not finite
RADIX_PACKING = {2: (5, 8), 3: (3, 7), 4: (5, 16), 5: (11, 45), 6: (12, 61)}
"""bits -> (codes a group, bits a group) when the 2 n + 1 symbols are packed as digits of one integer"""


@dataclass(frozen=True)
class LBWTensor:
    """Weights as integers: what is stored, and what a kernel needs."""

    codes: Tensor
    """int8, the weight's shape: 0, or +-(k+1) for +-2^(s-k); k = 0 is the largest level"""
    scale_exponent: Tensor
    """int32, `[]` (per tensor) or `[C]` (per channel): s"""
    bits: int

    @property
    def levels(self) -> Tensor:
        """The sorted representable values at scale 1, float32 `[2 n + 1]`."""
        return levels(self.bits)

    @property
    def level_index(self) -> Tensor:
        """Which of the sorted levels each code stands for, int64, the weight's shape."""
        n, codes = magnitudes(self.bits), self.codes.long()
        return n + codes.sign() * (n + 1 - codes.abs())

    def dequantize(self) -> Tensor:
        """Return the float32 values +-2^(s-k) or 0, the weight's shape, a new tensor."""
        codes = self.codes.to(torch.int32)
        s = per_row(self.scale_exponent, codes.ndim)
        return pow2(s - (codes.abs() - 1).clamp_min(0)) * codes.sign()


def magnitudes(bits: int) -> int:
    """Return n = 2^(bits-2), the number of nonzero magnitudes.

    Raises:
        ValueError: `bits` is not in 2..6.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"format 'lbw' has widths {MIN_BITS} to {MAX_BITS}, got {bits}")
    return 1 << (bits - 2)


def levels(bits: int) -> Tensor:
    """Return the sorted representable values at scale 1, float32 `[2 n + 1]`.

    >>> levels(3)
    tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    """
    positive = pow2(torch.arange(1 - magnitudes(bits), 1, dtype=torch.int32))
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def quantize(
    weight: Tensor, bits: int, solver: str = "exact", granularity: str = "per_channel", ratio: float = 0.75
) -> LBWTensor:
    """Find the codes and the scale exponents of a weight.

    Args:
        weight: float tensor `[C, ...]`, finite; solved in float32.
        bits: 2 to 6.
        solver: "exact" minimises the squared error; "semi" is the paper's semi-analytical rule.
        granularity: "per_tensor", or "per_channel" (one scale for each index of dimension 0).
        ratio: the semi-analytical rule's `mu / max|W|`, positive; the exact solver has no use for it.

    Returns:
        An `LBWTensor`, new. An all-zero row has s = 0 and codes 0. Among equally good s the largest is taken
        whose top level is in use.

    Raises:
        ValueError: an argument out of its range.
        NumericsError: the weight has values that are not finite.
    """
    arguments = _arguments(weight, bits, solver, granularity, ratio)
    codes, s = native.lbw(*arguments, torch.int8) or _codes(*arguments)
    return LBWTensor(codes, s if granularity == "per_channel" else s[0], bits)


def fake_quantize(
    weight: Tensor, bits: int, solver: str = "exact", granularity: str = "per_channel", ratio: float = 0.75
) -> Tensor:
    """Return the nearest representable weights, `quantize(...).dequantize()` without the codes in between.

    Args, Raises: as in `quantize`.

    Returns:
        The weight's shape, dtype and strides, a new tensor.

    Gradient:
        Straight through: the weight gets the gradient at the quantized weight, everywhere.
    """
    arguments = _arguments(weight, bits, solver, granularity, ratio)
    found = native.lbw(*arguments, torch.float32)
    return straight_through(weight, _values(*arguments) if found is None else found[0])


def check_options(solver: str, granularity: str, ratio: float) -> None:
    """Refuse what `quantize` does not have.

    Raises:
        ValueError: an unknown solver or granularity, or a ratio that is not positive.
    """
    check_granularity(granularity)
    if solver not in ("exact", "semi"):
        raise ValueError(f"solver must be 'exact' or 'semi', got {solver!r}")
    if not ratio > 0:
        raise ValueError(f"ratio must be positive, got {ratio}")


def _arguments(
    weight: Tensor, bits: int, solver: str, granularity: str, ratio: float
) -> tuple[Tensor, int, float, str]:
    """Return the weight, n, the ratio (0 for the exact solver) and the granularity, after a look at all."""
    check_options(solver, granularity, ratio)
    return weight.detach(), magnitudes(bits), ratio if solver == "semi" else 0.0, granularity


def _values(weight: Tensor, n: int, ratio: float, granularity: str) -> Tensor:
    """Return 2^s Q with the weight's shape, dtype and strides."""
    value, _, shift = _solve(weight, n, ratio, granularity)
    quantized = torch.empty_like(weight, dtype=torch.float32)  # has the weight's strides, value may not
    torch.mul(value.view(weight.shape), per_row(pow2(shift), weight.ndim), out=quantized)
    return quantized.copysign_(weight).to(weight.dtype)


def _codes(weight: Tensor, n: int, ratio: float, granularity: str) -> tuple[Tensor, Tensor]:
    """Return the codes, int8 of the weight's shape, and s, int32 `[R]`."""
    value, s, shift = _solve(weight, n, ratio, granularity)
    steps_below_top = s - exponent(value)
    codes = weight.sign() * torch.where(value > 0, steps_below_top + 1, 0).view(weight.shape)
    scale_exponent = torch.where(value.amax(-1, keepdim=True) > 0, s + shift, 0)
    return codes.to(torch.int8), scale_exponent.flatten().to(torch.int32)


def _solve(weight: Tensor, n: int, ratio: float, granularity: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return |2^s Q| * 2^-shift `[R, N]`, s - shift `[R, 1]` and shift `[R, 1]`; ratio 0 is the exact solver.

    The shift brings each row's maximum to [1/2, 1), so that neither subnormal nor huge weights need a case of
    their own (only to [1, 4) at the top of float32's range, where 2^-shift would be subnormal).
    """
    rows = as_rows(weight, granularity).float()
    largest = rows.abs().amax(-1, keepdim=True)
    check_finite(largest)
    shift = torch.frexp(largest)[1].clamp(-126, 126)
    magnitude = rows.abs().mul_(pow2(-shift))
    if ratio > 0:
        return *_semi_analytical(magnitude, n, ratio, _MAX_EXPONENT - shift), shift
    s = _exact_exponent(magnitude, n, _MAX_EXPONENT - shift)
    return _nearest_level(magnitude, s, n), s, shift


def _nearest_level(magnitude: Tensor, s: Tensor, n: int) -> Tensor:
    """Round to the nearest of 0, 2^(s-n+1) .. 2^s, ties upward; `[R, N]` and `[R, 1]` -> `[R, N]`."""
    value = nearest_pow2(magnitude).clamp_(pow2(s - n + 1), pow2(s))
    return value.mul_(magnitude >= pow2(s - n))


def _exact_exponent(magnitude: Tensor, n: int, max_s: Tensor) -> Tensor:
    """Search the best s of each row downwards (see the top of the file); `[R, N]` -> int32 `[R, 1]`."""
    start = exponent(nearest_pow2(magnitude.amax(-1, keepdim=True))).minimum(max_s)
    best = start.clone()
    alive = torch.arange(len(magnitude), device=magnitude.device)
    s, a = start, magnitude
    error = best_error = torch.zeros_like(s, dtype=torch.float64)  # relative to the error at s0
    while len(alive):
        top, p = pow2(s), pow2(s - n)
        clipped = (a - 0.75 * top).clamp_min_(0).sum(-1, keepdim=True, dtype=torch.float64) * top
        gained = (0.5 * p - (a - p).abs_()).clamp_min_(0).sum(-1, keepdim=True, dtype=torch.float64) * (2 * p)
        s, error = s - 1, error + (clipped - gained)
        better = error < best_error
        best[alive] = torch.where(better, s, best[alive])
        best_error = torch.minimum(error, best_error)
        can_win = (error - a.shape[-1] * (0.5 * p.double()).square() < best_error).squeeze(-1)
        can_win &= a.amax(-1) > 0
        alive, s, error, best_error = alive[can_win], s[can_win], error[can_win], best_error[can_win]
        a = a if len(alive) == len(a) else a[can_win]
    return best


def _semi_analytical(magnitude: Tensor, n: int, ratio: float, max_s: Tensor) -> tuple[Tensor, Tensor]:
    """Assign levels by the paper's rule with mu = ratio * max|W|, then the best s for them; the value and s.

    |Q| is 0 below 2^(2-n) mu / 3, 2^(1-n) up to 2^(2-n) mu, 2^-t from 2^-t mu to 2^(1-t) mu,
    and 1 from mu on.
    """
    a = magnitude.double()
    mu = ratio * a.amax(-1, keepdim=True)
    below_top = (-_floor_log2(a / mu)).clamp(0, n - 1)
    level = pow2(-below_top) * (3 * a >= 2.0 ** (2 - n) * mu) * (a > 0)
    squares = level.double().square().sum(-1, keepdim=True)
    s = _floor_log2(4 * (a * level).sum(-1, keepdim=True) / (3 * squares))
    s = torch.where(squares > 0, s, 0).minimum(max_s)
    return level * pow2(s), s


def _floor_log2(x: Tensor) -> Tensor:
    """Return floor(log2(x)) as int32, exactly (frexp, no logarithm); 0, nan and inf give -1."""
    return torch.frexp(x)[1] - 1
