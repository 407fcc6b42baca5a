"""Schedules by name: pure functions of the training step."""

from __future__ import annotations

from lbdet.schedules.constant import Constant

Schedule = Constant
SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant}

__all__ = ["SCHEDULES", "Constant", "Schedule"]
