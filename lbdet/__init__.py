"""lbdet: low-bit object detection.

>>> import lbdet
>>> model, coverage = lbdet.quantize_model(model, "W4")                    # doctest: +SKIP
>>> lbdet.set_precision(model, {"backbone.0": lbdet.Precision(2)})         # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbdet import metrics as metrics
    from lbdet.convert import ActivationFormat as ActivationFormat
    from lbdet.convert import Override as Override
    from lbdet.convert import WeightFormat as WeightFormat
    from lbdet.convert import calibrate_activations as calibrate_activations
    from lbdet.convert import coverage as coverage
    from lbdet.convert import quantize_model as quantize_model
    from lbdet.convert import set_precision as set_precision
    from lbdet.nn.batch_norm import recalibrate_bn as recalibrate_bn
    from lbdet.precision import Precision as Precision

__version__ = "0.1.0"

_HOMES = {
    "ActivationFormat": "lbdet.convert",
    "Override": "lbdet.convert",
    "Precision": "lbdet.precision",
    "WeightFormat": "lbdet.convert",
    "calibrate_activations": "lbdet.convert",
    "coverage": "lbdet.convert",
    "quantize_model": "lbdet.convert",
    "recalibrate_bn": "lbdet.nn.batch_norm",
    "set_precision": "lbdet.convert",
}


def __getattr__(name: str) -> Any:
    """Import public names at first use, so that `import lbdet` alone loads no torch."""
    if name == "metrics":
        return import_module("lbdet.metrics")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lbdet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "metrics"])
