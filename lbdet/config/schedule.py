"""The section `schedule`: how precise each layer is at each step."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from lbdet.config.section import PrecisionText, Section
from lbdet.schedules import Constant, Cyclic, Progressive, Schedule, Stochastic, TwoStage


class StochasticConfig(Section):
    """A random share of blocks is quantized at each step, the rest is float; the share rises to 1."""

    first: float = Field(default=0.5, ge=0, le=1)
    """the share at step 0"""
    until: float = Field(default=0.8, gt=0, le=1)
    """share of all updates after which every block is quantized"""
    blocks: list[str] = Field(default=[])
    """patterns of module names; empty = found from the module tree"""


class PhaseChangeConfig(Section):
    """What happens where a schedule goes on to another width."""

    ranges: Literal["calibrate", "rescale"] = "calibrate"
    """of activations whose width changes: measured on training images, or the clip before at the new width"""
    reset_momentum: bool = False
    """forget the optimizer's averages"""
    restart_lr: bool = True
    """begin the learning-rate curve, its warm-up too, again for each phase"""


class _ScheduleSection(Section):
    """How precise each layer is at each step. Every schedule has these keys."""

    target: PrecisionText
    stochastic: StochasticConfig | None = None
    phase_change: PhaseChangeConfig = PhaseChangeConfig()

    def build(self, seed: int = 0) -> Schedule:
        """Make the schedule; `seed` is that of the draws of stochastic precision."""
        if self.stochastic is None:
            return self.plain()
        return Stochastic(self.plain(), self.stochastic.first, self.stochastic.until, seed)

    def plain(self) -> Schedule:
        """Make the schedule without stochastic precision; its ValueErrors are the config's."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _makes_a_schedule(self) -> _ScheduleSection:
        self.plain()
        return self


class ConstantConfig(_ScheduleSection):
    """The target from the first step to the last."""

    name: Literal["constant"]

    def plain(self) -> Constant:
        return Constant(self.target)


class TwoStageConfig(_ScheduleSection):
    """Weights first, then activations too."""

    name: Literal["two_stage"]
    share: float = Field(default=0.5, gt=0, lt=1)
    """of the updates, for the weights alone"""

    def plain(self) -> TwoStage:
        return TwoStage(self.target, self.share)


class ProgressiveConfig(_ScheduleSection):
    """One width after the other."""

    name: Literal["progressive"]
    through: list[PrecisionText] = Field(min_length=1)
    """the widths before the target"""
    shares: list[float] | None = None
    """of the updates: one a width, the target's too; null = equal"""
    two_stage: bool = False
    """whether each width begins with the weights alone"""

    def plain(self) -> Progressive:
        shares = None if self.shares is None else tuple(self.shares)
        return Progressive((*self.through, self.target), shares, self.two_stage)


class CyclicConfig(_ScheduleSection):
    """Down from `start` to the target by a bit a stage, several times."""

    name: Literal["cyclic"]
    start: PrecisionText
    cycles: int = Field(default=2, ge=1, le=1000)

    def plain(self) -> Cyclic:
        return Cyclic(self.start, self.target, self.cycles)


def _constant_unless_named(value: object) -> object:
    return {"name": "constant"} | value if isinstance(value, dict) else value


ScheduleSection = ConstantConfig | TwoStageConfig | ProgressiveConfig | CyclicConfig
ScheduleConfig = Annotated[
    ScheduleSection, Field(discriminator="name"), BeforeValidator(_constant_unless_named)
]
SCHEDULES = {get_args(s.model_fields["name"].annotation)[0]: s for s in get_args(ScheduleSection)}
"""section by name"""
