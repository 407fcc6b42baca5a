"""Granularity as a view: a weight becomes rows that each have one scale. What all formats refuse in them."""

from __future__ import annotations

import torch
from torch import Tensor

from lbdet.errors import NumericsError

GRANULARITIES = ("per_tensor", "per_channel")


def check_granularity(granularity: str) -> None:
    """Refuse what is none of `GRANULARITIES`.

    Raises:
        ValueError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")


def as_rows(weight: Tensor, granularity: str) -> Tensor:
    """View a weight `[C, ...]` as `[1, N]` (per_tensor) or `[C, N / C]` (per_channel).

    Raises:
        ValueError: an unknown granularity.
    """
    check_granularity(granularity)
    return weight.reshape(1, -1) if granularity == "per_tensor" else weight.reshape(weight.shape[0], -1)


def per_row(scale: Tensor, ndim: int) -> Tensor:
    """Shape a scale `[]` or `[C]` so that it broadcasts
    against a weight `[C, ...]` with `ndim` dimensions.
    """
    return scale if scale.ndim == 0 else scale.view(-1, *[1] * (ndim - 1))


def check_finite(weight: Tensor) -> None:
    """Refuse a weight (or the extremes of one) with NaN or infinity.

    Raises:
        NumericsError: the weight has values that are not finite.
    """
    if weight.numel() and not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
        raise NumericsError("a weight has values that are not finite")
