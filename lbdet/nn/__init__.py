"""Quantized layers, and the number formats of their weights and inputs by name."""

from __future__ import annotations

from dataclasses import dataclass

from lbdet.nn.activations import (
    ActivationQuantizer,
    BinaryActivation,
    DorefaActivation,
    UniformActivation,
)
from lbdet.nn.layers import (
    HeldWeight,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    quantized_input,
    quantized_weight,
    rebind_hooks,
)
from lbdet.nn.weights import (
    BinaryWeight,
    DorefaWeight,
    LbwWeight,
    LearnedLevelsWeight,
    Quantized,
    UniformWeight,
    WeightQuantizer,
)


@dataclass(frozen=True)
class Format:
    """The quantizers of a number format; None where it has none."""

    weight: type[WeightQuantizer] | None
    activation: type[ActivationQuantizer] | None


FORMATS: dict[str, Format] = {
    "lbw": Format(LbwWeight, None),
    "uniform": Format(UniformWeight, UniformActivation),
    "dorefa": Format(DorefaWeight, DorefaActivation),
    "binary": Format(BinaryWeight, BinaryActivation),
    "learned_levels": Format(LearnedLevelsWeight, None),
}

__all__ = [
    "FORMATS", "ActivationQuantizer", "BinaryActivation", "BinaryWeight", "DorefaActivation", "DorefaWeight",
    "Format", "HeldWeight", "LbwWeight", "LearnedLevelsWeight", "QuantConv2d", "QuantLayer", "QuantLinear",
    "Quantized", "UniformActivation", "UniformWeight", "WeightQuantizer", "quantized_input",
    "quantized_weight",
    "rebind_hooks",
]  # fmt: skip
