"""Which stretch of training is a step in? What every schedule is made of: widths that follow each other.

stages        shares    of 100 updates
W2, W2A2      1, 3      W2 at steps 0 .. 24, W2A2 at 25 .. 99
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lbdet.errors import UserError
from lbdet.precision import Plan, Precision


@dataclass(frozen=True)
class Stage:
    """A width and its share of the updates, relative to the shares of the others."""

    precision: Precision
    share: float = 1.0


class Schedule(ABC):
    """How precise is each layer now? A pure function of the step: no state, no model."""

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """Return the widths in their order; the last one is the target."""

    def precisions(self) -> tuple[Precision, ...]:
        """Return every precision that a plan can give."""
        return tuple(dict.fromkeys(stage.precision for stage in self.stages()))

    def check(self, total_steps: int) -> None:
        """Refuse a training in which a stage would get no update.

        Raises:
            UserError: naming the stage. No updates at all are fine: the plan is the target.
        """
        if total_steps:
            _starts(joined(self.stages()), total_steps)

    def plan(
        self, step: int, total_steps: int, layers: Sequence[str], blocks: Mapping[str, Sequence[str]]
    ) -> Plan:
        """Return the precision of each of `layers` at a step.

        Args:
            step: counted in optimizer updates from 0.
            total_steps: all updates of the training; 0 = nothing is trained.
            layers: the names of the layers whose width a plan sets.
            blocks: block -> its layers; for schedules that treat the layers of a block alike.

        Raises:
            UserError: a stage gets no update.
        """
        stages = joined(self.stages())
        starts = _starts(stages, total_steps) if total_steps else [0] * len(stages)
        phase = bisect_right(starts, step) - 1
        precision = dict.fromkeys(layers, stages[phase].precision)
        end = total_steps if phase + 1 == len(stages) else starts[phase + 1]
        return Plan(precision, precision, phase, range(starts[phase], end))


def joined(stages: Sequence[Stage]) -> list[Stage]:
    """Join neighbours of the same width."""
    result: list[Stage] = []
    for stage in stages:
        if result and result[-1].precision == stage.precision:
            stage = Stage(stage.precision, result.pop().share + stage.share)
        result.append(stage)
    return result


def _starts(stages: Sequence[Stage], total_steps: int) -> list[int]:
    """Return the first step of each stage."""
    shares = [stage.share for stage in stages]
    whole = math.fsum(shares)
    starts = [round(total_steps * math.fsum(shares[:i]) / whole) for i in range(len(shares))]
    for stage, (start, end) in zip(stages, pairwise([*starts, total_steps]), strict=True):
        if start >= end:
            raise UserError(
                f"schedule: each of the {len(stages)} stages needs an update, got none for "
                f"{stage.precision} of {total_steps}; train longer or give it a larger share"
            )
    return starts
