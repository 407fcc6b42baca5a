"""Configs: the schema, and how a file becomes one."""

from __future__ import annotations

from lbdet.config.differences import differences
from lbdet.config.load import dump_config, load_config
from lbdet.config.schema import (
    Config,
    DataConfig,
    ScheduleConfig,
    activation_format,
    weight_format,
)  # fmt: skip

__all__ = ["Config", "DataConfig", "ScheduleConfig", "activation_format", "differences", "dump_config",
           "load_config", "weight_format"]  # fmt: skip
