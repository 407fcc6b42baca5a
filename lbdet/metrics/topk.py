"""How often is the right class among the k best scores?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lbdet.errors import NumericsError


def top_k(
    scores: ArrayLike | Tensor, labels: ArrayLike | Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Compute the share of images whose label has one of the k highest scores.

    A label stands behind every class with an equal score: a network that scores all classes alike knows
    nothing, and has 0.

    Args:
        scores: `[N, C]`, higher is better, on any scale: logits or probabilities; infinities may be among
            them.
        labels: whole numbers `[N]` in 0..C-1.
        ks: each at least 1; from k = C on every image is right.

    Returns:
        `{"top1": ..., "top5": ...}`, in [0, 1]; nan where N = 0.

    Raises:
        ValueError: shapes, labels or a k that do not fit.
        NumericsError: a score is nan.

    >>> top_k([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]], [1, 0])
    {'top1': 0.5, 'top5': 1.0}
    """
    scores = torch.as_tensor(scores)
    labels = torch.as_tensor(labels, device=scores.device)
    _check(scores, labels, ks)
    own = scores.gather(1, labels.long()[:, None])
    ahead = (scores >= own).sum(1) - 1  # classes other than the label's own
    return {f"top{k}": float((ahead < k).double().mean()) for k in ks}


def _check(scores: Tensor, labels: Tensor, ks: Sequence[int]) -> None:
    fractional = labels.is_floating_point() and labels.numel() > 0  # an empty list becomes float
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or fractional:
        got = f"{list(scores.shape)} and {labels.dtype} {list(labels.shape)}"
        raise ValueError(f"scores and labels must be [N, C] and whole numbers [N], got {got}")
    outside = labels[(labels < 0) | (labels >= scores.shape[1])]
    if len(outside):
        raise ValueError(f"labels must lie in 0..{scores.shape[1] - 1}, got {int(outside[0])}")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks: each must be at least 1, got {list(ks)}")
    unknown = int(scores.isnan().any(1).sum())
    if unknown:
        raise NumericsError(f"scores must be numbers, got nan for {unknown} of {len(scores)} images")
