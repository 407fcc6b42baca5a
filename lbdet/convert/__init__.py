"""From a float model to a quantized one, its widths, ranges and coverage."""

from __future__ import annotations

from lbdet.convert.blocks import find_blocks
from lbdet.convert.calibrate import calibrate_activations, correct_bn, uncalibrated
from lbdet.convert.layers import (
    check_width,
    hold_weights,
    quantization_losses,
    quantized_layers,
    rescale_range,
    scheduled_layers,
    set_float,
    set_precision,
    set_scheduled_precision,
    settle,
    start_weights,
)  # fmt: skip
from lbdet.convert.quantize import ActivationFormat, Override, WeightFormat, quantize_model
from lbdet.convert.report import (
    LayerCoverage,
    coverage,
    coverage_json,
    coverage_summary,
    model_bytes,
)  # fmt: skip

__all__ = [
    "ActivationFormat", "LayerCoverage", "Override", "WeightFormat", "calibrate_activations", "check_width",
    "correct_bn", "coverage", "coverage_json", "coverage_summary", "find_blocks", "hold_weights",
    "model_bytes", "quantization_losses", "quantize_model", "quantized_layers", "rescale_range",
    "scheduled_layers", "set_float", "set_precision", "set_scheduled_precision", "settle", "start_weights",
    "uncalibrated",
]  # fmt: skip
