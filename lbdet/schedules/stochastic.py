"""Must all blocks be quantized in every step? A random part of them is, the rest computes in float.

    share(step) = min(1, first + (1 - first) * step / (until * (total_steps - 1)))

At each step exactly round(share * n) of the n blocks are drawn, by a hash of (seed, step, block): the same on
every machine and in every process, with no state to save.

Reference:
    Zhuang, Tan, Liu, Liu, Reid, Shen 2022, "Effective training of convolutional neural networks with
    low-bitwidth weights and activations", arXiv 1908.04680.

Differs from the paper:
    The share rises linearly and stays at 1 for the rest; it wraps any schedule, whose widths the blocks have
    that are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lbdet.precision import FLOAT, Plan, Precision
from lbdet.schedules.stages import Schedule, Stage


@dataclass(frozen=True)
class Stochastic(Schedule):
    """Quantize a random share of blocks at each step, as `inner` says; the share rises to 1 and stays.

    Args:
        inner: the schedule that is wrapped; the phases are its own.
        first: the share at step 0, in [0, 1].
        until: the share of all updates after which every block is quantized, in (0, 1].
        seed: of the draws.

    Raises:
        ValueError: `first` or `until` out of its range.
    """

    inner: Schedule
    first: float = 0.5
    until: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= 1:
            raise ValueError(f"first must be a share from 0 to 1, got {self.first}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until must be a share above 0, at most 1, got {self.until}")

    def stages(self) -> tuple[Stage, ...]:
        return self.inner.stages()

    def precisions(self) -> tuple[Precision, ...]:
        return tuple(dict.fromkeys((*self.inner.precisions(), FLOAT)))

    def share(self, step: int, total_steps: int) -> float:
        """Return the share of blocks that is quantized at a step."""
        if step >= self.until * (total_steps - 1):
            return 1.0
        return self.first + (1 - self.first) * step / (self.until * (total_steps - 1))

    def plan(
        self, step: int, total_steps: int, layers: Sequence[str], blocks: Mapping[str, Sequence[str]]
    ) -> Plan:
        """As `Schedule.plan`.

        Raises:
            ValueError: a layer is in no block.
        """
        plan = self.inner.plan(step, total_steps, layers, blocks)
        loose = set(layers).difference(*blocks.values())
        if loose:
            raise ValueError(f"every layer must be in a block, got {min(loose)!r} in none")
        drawn = sorted(blocks, key=lambda block: self._draw(step, block))
        left = drawn[round(self.share(step, total_steps) * len(blocks)) :]
        in_float = {layer for block in left for layer in blocks[block]}
        precision = {name: FLOAT if name in in_float else p for name, p in plan.precision.items()}
        return replace(plan, precision=precision)

    def _draw(self, step: int, block: str) -> bytes:
        return hashlib.sha256(f"{self.seed} {step} {block}".encode()).digest()
