"""Layers that compute with quantized weights and train float ones.

`from_float` shares the original's parameters and overrides only `forward`: state dict keys stay
torchvision's, and at full precision the output is the original's bit for bit.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.nn.formats import WeightQuantizer
from lbdet.precision import FLOAT, Precision


class QuantConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight is quantized to `precision.weight_bits` in the forward pass
    (float at first).
    """

    weight_quantizer: WeightQuantizer
    precision: Precision
    scheduled: bool
    """whether a plan may change `precision`; an override with a width of its own says no"""

    @classmethod
    def from_float(cls, conv: nn.Conv2d, weight_quantizer: WeightQuantizer) -> QuantConv2d:
        """Wrap `conv`; its parameters are shared, not copied."""
        shape: Any = conv  # torch declares 2-tuples where it stores tuples
        with torch.device("meta"):
            layer = cls(
                conv.in_channels, conv.out_channels, shape.kernel_size, shape.stride, shape.padding,
                shape.dilation, conv.groups, conv.bias is not None, conv.padding_mode,
            )  # fmt: skip
        return _adopt(layer, conv, weight_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, quantized_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class QuantLinear(nn.Linear):
    """`nn.Linear` whose weight is quantized to `precision.weight_bits` in the forward pass
    (float at first).
    """

    weight_quantizer: WeightQuantizer
    precision: Precision
    scheduled: bool

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_quantizer: WeightQuantizer) -> QuantLinear:
        """Wrap `linear`; its parameters are shared, not copied."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        return _adopt(layer, linear, weight_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, quantized_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


QuantLayer = QuantConv2d | QuantLinear
LayerT = TypeVar("LayerT", QuantConv2d, QuantLinear)


def quantized_weight(layer: QuantLayer) -> Tensor:
    """Return the weight that the layer computes with now:
    the float parameter itself, or its fake-quantized values.
    """
    bits = layer.precision.weight_bits
    return layer.weight if bits is None else layer.weight_quantizer(layer.weight, bits)


def _adopt(layer: LayerT, original: nn.Conv2d | nn.Linear, weight_quantizer: WeightQuantizer) -> LayerT:
    for name, parameter in original.named_parameters(recurse=False):
        setattr(layer, name, parameter)
    layer.weight_quantizer = weight_quantizer
    layer.precision, layer.scheduled = FLOAT, True
    return layer.train(original.training)
