"""Quantized layers, and the number formats of their weights by name."""

from __future__ import annotations

from lbdet.nn.formats import LbwWeight, Quantized, UniformWeight, WeightQuantizer
from lbdet.nn.layers import QuantConv2d, QuantLayer, QuantLinear, quantized_weight

FORMATS: dict[str, type[WeightQuantizer]] = {"lbw": LbwWeight, "uniform": UniformWeight}

__all__ = [
    "FORMATS", "LbwWeight", "QuantConv2d", "QuantLayer", "QuantLinear", "Quantized", "UniformWeight",
    "WeightQuantizer", "quantized_weight",
]  # fmt: skip
