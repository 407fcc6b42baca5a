"""The simplest answer to "how precise is each layer now?": always the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lbdet.precision import Plan, Precision


@dataclass(frozen=True)
class Constant:
    """Train at the target precision from the first step to the last."""

    target: Precision

    def precisions(self) -> tuple[Precision, ...]:
        """Return every precision that a plan can give."""
        return (self.target,)

    def plan(
        self, step: int, total_steps: int, layers: Sequence[str], blocks: Mapping[str, Sequence[str]]
    ) -> Plan:
        """Return the precision of each of `layers` at `step`, counted in optimizer updates from 0."""
        return Plan(dict.fromkeys(layers, self.target), phase=0)
