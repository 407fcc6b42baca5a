"""Is the way from float to a few bits easier in small steps? Falling widths, each trained for a while.

    widths                   two_stage      stages
    float W8A8 W4A4 W2A2     false          float, W8A8, W4A4, W2A2
    W8A8 W4A4                true           W8, W8A8, W4A8, W4A4

Reference:
    Zhuang, Shen, Tan, Liu, Reid 2018, "Towards effective low-bitwidth convolutional neural networks", arXiv
    1711.00205 (its progressive quantization).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from lbdet.precision import FLOAT, Precision
from lbdet.schedules.stages import Schedule, Stage


@dataclass(frozen=True)
class Progressive(Schedule):
    """Train at one width after the other.

    Args:
        widths: in their order, the target last; at least one.
        shares: of the updates, one a width, positive, relative to each other; None = equal shares.
        two_stage: whether each width begins with the weights alone, while activations keep the width before
            (float before the first); the share is halved.

    Raises:
        ValueError: no width, a wrong number of shares, or one that is not positive and finite.
    """

    widths: tuple[Precision, ...]
    shares: tuple[float, ...] | None = None
    two_stage: bool = False

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths must not be empty")
        if self.shares is not None and len(self.shares) != len(self.widths):
            raise ValueError(f"shares must be one a width ({len(self.widths)}), got {len(self.shares)}")
        if not all(0 < share < math.inf for share in self.shares or ()):
            raise ValueError(f"shares must be positive, got {list(self.shares or ())}")

    def stages(self) -> tuple[Stage, ...]:
        shares = self.shares or (1.0,) * len(self.widths)
        whole = tuple(Stage(width, share) for width, share in zip(self.widths, shares, strict=True))
        return tuple(self._weights_first(whole)) if self.two_stage else whole

    @staticmethod
    def _weights_first(stages: tuple[Stage, ...]) -> Iterator[Stage]:
        before = FLOAT
        for stage in stages:
            yield Stage(Precision(stage.precision.weight_bits, before.act_bits), stage.share / 2)
            yield Stage(stage.precision, stage.share / 2)
            before = stage.precision
