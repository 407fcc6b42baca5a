"""From a config to objects.

What can be wrong with a config is found here, before anything is written or trained.
"""

from __future__ import annotations

from lbdet.build.data import build_train_set, download, named_classes, read_data
from lbdet.build.model import Built, build, build_blocks, build_guidance, load_run
from lbdet.build.task import (
    build_settings,
    build_task,
    check_batch_norm,
    check_kind,
    check_processes,
    is_classification,
)

__all__ = [
    "Built", "build", "build_blocks", "build_guidance", "build_settings", "build_task", "build_train_set",
    "check_batch_norm", "check_kind", "check_processes", "download", "is_classification", "load_run",
    "named_classes", "read_data",
]  # fmt: skip
