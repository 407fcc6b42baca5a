"""The simplest answer to "how precise is each layer now?": always the target."""

from __future__ import annotations

from dataclasses import dataclass

from lbdet.precision import Precision
from lbdet.schedules.stages import Schedule, Stage


@dataclass(frozen=True)
class Constant(Schedule):
    """Train at the target precision from the first step to the last."""

    target: Precision

    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.target),)
