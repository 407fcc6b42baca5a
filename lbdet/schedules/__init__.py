"""Schedules: how precise is each layer at a training step? Pure functions of the step."""

from __future__ import annotations

from lbdet.schedules.constant import Constant
from lbdet.schedules.cyclic import Cyclic
from lbdet.schedules.progressive import Progressive
from lbdet.schedules.stages import Schedule
from lbdet.schedules.stochastic import Stochastic
from lbdet.schedules.two_stage import TwoStage

__all__ = [
    "Constant",
    "Cyclic",
    "Progressive",
    "Schedule",
    "Stochastic",
    "TwoStage",
]
