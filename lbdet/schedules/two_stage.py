"""Do weights and activations have to lose their precision at once? First the weights, then the activations.

    target W2A2, share 0.5      W2, then W2A2

Reference:
    Zhuang, Shen, Tan, Liu, Reid 2018, "Towards effective low-bitwidth convolutional neural networks", arXiv
    1711.00205 (its two-step optimization).
"""

from __future__ import annotations

from dataclasses import dataclass

from lbdet.precision import Precision
from lbdet.schedules.stages import Schedule, Stage


@dataclass(frozen=True)
class TwoStage(Schedule):
    """Train with quantized weights and float activations first. A target without act bits has one stage.

    Args:
        target: the precision of the second stage.
        share: the first stage's share of the updates, between 0 and 1.

    Raises:
        ValueError: `share` out of its range.
    """

    target: Precision
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")

    def stages(self) -> tuple[Stage, ...]:
        weights_only = Precision(self.target.weight_bits)
        return Stage(weights_only, self.share), Stage(self.target, 1 - self.share)
