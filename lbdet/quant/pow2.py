"""Which power of two is nearest to a number? Exact arithmetic on the bits of a float32.

Nearest is meant in arithmetic: the border between 2^k and 2^(k+1) is 1.5 * 2^k, not sqrt(2) * 2^k. No
logarithm is taken, so no rounding of one can move a border.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF_MANTISSA = 0x00400000
_EXPONENT_MASK = 0x7F800000


def nearest_pow2(magnitude: Tensor) -> Tensor:
    """Round positive numbers to the nearest power of two, ties upward.

    Adding half a mantissa carries into the exponent exactly where the fraction is 1.5 or
    more; clearing the mantissa leaves a power of two. Not for subnormal numbers: 0 stays 0,
    and those below 2^-126 become 0 or 2^-126.

    Args:
        magnitude: float32, any shape, values in [0, 1.5 * 2^127).

    Returns:
        float32, same shape, a new tensor.

    >>> nearest_pow2(torch.tensor([1.4999, 1.5, 2.9, 3.0]))
    tensor([1., 2., 2., 4.])
    """
    return ((magnitude.view(torch.int32) + _HALF_MANTISSA) & _EXPONENT_MASK).view(torch.float32)


def exponent(magnitude: Tensor) -> Tensor:
    """Return `floor(log2(x))` of positive normal float32 numbers as int32 (-127 for 0)."""
    return (magnitude.view(torch.int32) >> 23) - 127


def pow2(exponent: Tensor) -> Tensor:
    """Return 2^exponent as float32, exactly, subnormal numbers included; 0 below 2^-149, inf above 2^127.

    Args:
        exponent: int32, any shape, in [-252, 254].

    >>> pow2(torch.tensor([-149, 0, 3], dtype=torch.int32)).log2()
    tensor([-149.,    0.,    3.])
    """
    normal = exponent.clamp(-126, 127)
    return _normal_pow2(normal) * _normal_pow2(exponent - normal)


def _normal_pow2(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)
