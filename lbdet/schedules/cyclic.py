"""What if a network climbs back up? Widths fall by a bit a stage, and the weights found at the lowest one are
where the next cycle begins, at the top again.

    start W4A4, target W2A2, cycles 2      W4A4, W3A3, W2A2, W4A4, W3A3, W2A2

Reference:
    Kim, Shin, Del Barrio 2022, "CTMQ: Cyclic training of convolutional neural networks with multiple
    quantization steps", arXiv 2206.12794.
"""

from __future__ import annotations

from dataclasses import dataclass

from lbdet.precision import Precision
from lbdet.schedules.stages import Schedule, Stage


@dataclass(frozen=True)
class Cyclic(Schedule):
    """Train down from `start` to `target`, `cycles` times, in stages of equal length.

    Weights and activations fall together; the one that reaches its target first waits there.

    Raises:
        ValueError: `start` is narrower than `target` or has another half, or fewer than one cycle.
    """

    start: Precision
    target: Precision
    cycles: int = 2

    def __post_init__(self) -> None:
        for first, last in self._halves():
            if (first is None) != (last is None):
                raise ValueError(f"start must quantize what target {self.target} does, got {self.start}")
            if (first or 0) < (last or 0):
                raise ValueError(f"start must be at least as wide as target {self.target}, got {self.start}")
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {self.cycles}")

    def stages(self) -> tuple[Stage, ...]:
        falls = max((first or 0) - (last or 0) for first, last in self._halves())
        return tuple(Stage(self._after(fall)) for fall in range(falls + 1)) * self.cycles

    def _halves(self) -> tuple[tuple[int | None, int | None], ...]:
        return (
            (self.start.weight_bits, self.target.weight_bits),
            (self.start.act_bits, self.target.act_bits),
        )

    def _after(self, falls: int) -> Precision:
        return Precision(
            *(None if last is None else max((first or 0) - falls, last) for first, last in self._halves())
        )
