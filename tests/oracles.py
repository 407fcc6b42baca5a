"""Slow, plain versions of the number formats: every scale, every level, every weight.

They share no code with `lbdet.quant` and calculate in float64, in which float32 numbers and their squares are
exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

Codes = list[int]


def lbw_levels(bits: int) -> Tensor:
    """Return 0, +-2^-k for k = 0 .. n-1, sorted, float64 `[2 n + 1]`."""
    positive = [2.0**-k for k in range(2 ** (bits - 2))]
    return torch.tensor(sorted([0.0, *positive, *(-p for p in positive)]), dtype=torch.float64)


def nearest(weight: Tensor, levels: Tensor) -> Tensor:
    """Return the level nearest to each weight, of two as near the one further from 0; any shape, float64."""
    values = levels[levels.abs().argsort(descending=True, stable=True)]
    distance = (weight.double().unsqueeze(-1) - values).abs()
    return values[distance.argmin(-1)]


def squared_error(weight: Tensor, quantized: Tensor) -> float:
    """Return ||weight - quantized||^2 in float64."""
    return (weight.double() - quantized.double()).square().sum().item()


def lbw_errors(weight: Tensor, bits: int) -> dict[int, float]:
    """Return the least squared error at every s that could be best, s <= 127; not for an all-zero weight."""
    scales = _scales(weight.double().flatten().tolist())
    levels = lbw_levels(bits)
    return {s: squared_error(weight, nearest(weight, levels * 2.0**s)) for s in scales if s <= 127}


def lbw_exact_by_fractions(weights: Sequence[Fraction], bits: int) -> tuple[int, Codes]:
    """Solve in exact arithmetic: s and the codes; ties to the largest s at which some code is 1 or -1."""
    solutions = {}
    for s in _scales(weights):
        solution = [_nearest_code(w, s, bits) for w in weights]
        if any(abs(code) == 1 for code in solution):
            error = sum((w - _value(code, s)) ** 2 for w, code in zip(weights, solution, strict=True))
            solutions[s] = (-error, s, solution)
    _, s, codes = max(solutions.values())
    return s, codes


def _scales(weights: Sequence[Fraction] | Sequence[float]) -> range:
    """Return all s that could be best: above, all weights are 0 at any width; below, all clip, ever more."""
    magnitudes = [abs(w) for w in weights if w]
    return range(_floor_log2(min(magnitudes)) - 1, _floor_log2(max(magnitudes)) + 18)


def _nearest_code(weight: Fraction, s: int, bits: int) -> int:
    codes = range(-(2 ** (bits - 2)), 2 ** (bits - 2) + 1)
    return min(codes, key=lambda code: (abs(weight - _value(code, s)), -abs(_value(code, s))))


def _value(code: int, s: int) -> Fraction:
    if code == 0:
        return Fraction(0)
    return Fraction(2) ** (s - abs(code) + 1) * (1 if code > 0 else -1)


def lbw_ternary_by_sorting(weight: Tensor) -> Tensor:
    """Return the 2-bit solution for a whole tensor by the formula of LBW-Net, in O(N log N), float64.

    For each count k of nonzero weights the k largest are kept, and s = floor(log2(4 ||W_k||_1 / (3 k))); the
    k with the least squared error wins.
    """
    magnitude, order = weight.flatten().double().abs().sort(descending=True)
    k = torch.arange(1, magnitude.numel() + 1, dtype=torch.float64)
    kept = magnitude.cumsum(0)
    scale = torch.tensor([2.0 ** min(_floor_log2(x), 127) for x in (4 * kept / (3 * k)).tolist()]).double()
    best = int((scale.square() * k - 2 * scale * kept).argmin())
    levels = torch.zeros_like(magnitude)
    levels[order[: best + 1]] = scale[best]
    return levels.view(weight.shape) * weight.sign()


def lbw_semi(weights: Sequence[float], bits: int, ratio: float) -> list[float]:
    """Return the weights quantized by the paper's semi-analytical rule, one by one; 2^s is a float32."""
    n = 2 ** (bits - 2)
    mu = ratio * max(abs(w) for w in weights)
    q = [math.copysign(_semi_level(abs(w), mu, n) if w else 0.0, w) for w in weights]
    if not any(q):
        return q
    s = _floor_log2(
        4 * math.fsum(w * v for w, v in zip(weights, q, strict=True)) / (3 * math.fsum(v * v for v in q))
    )
    return [2.0 ** min(s, 127) * v for v in q]


def _semi_level(magnitude: float, mu: float, n: int) -> float:
    if n == 1:
        return 0.0 if magnitude < 2 * mu / 3 else 1.0
    if n == 2:
        return 0.0 if magnitude < mu / 3 else 0.5 if magnitude < mu else 1.0
    if 3 * magnitude < 2.0 ** (2 - n) * mu:  # not divided by 3: a border must not be rounded
        return 0.0
    if magnitude < 2.0 ** (2 - n) * mu:
        return 2.0 ** (1 - n)
    for t in range(n - 2, 0, -1):
        if 2.0**-t * mu <= magnitude < 2.0 ** (1 - t) * mu:
            return 2.0**-t
    return 1.0


def _floor_log2(x: Fraction | float) -> int:
    return math.frexp(x)[1] - 1
