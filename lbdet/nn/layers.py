"""Layers that compute with quantized weights and inputs, and train float weights.

`from_float` shares the original's parameters, buffers and hooks and overrides only `forward`: state dict keys
stay torchvision's, and at full precision the output is the original's bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.nn.activations import ActivationQuantizer, UniformActivation
from lbdet.nn.version import version
from lbdet.nn.weights import WeightQuantizer
from lbdet.precision import FLOAT, Precision


@dataclass(frozen=True)
class HeldWeight:
    """A quantized weight, and what it was made of. It serves until that is replaced or changed in place;
    only what is written through `.data`, which torch does not count, goes unseen. One that carries a
    gradient serves one backward pass.
    """

    values: Tensor
    precision: Precision
    with_gradient: bool
    made_of: Sequence[Tensor]
    versions: Sequence[object]

    @classmethod
    def of(cls, layer: QuantLayer) -> HeldWeight:
        """Quantize the weight of a layer at its precision, with a gradient where gradients are on."""
        made_of = _made_of(layer)
        values = quantized_weight(layer)
        versions = [version(tensor) for tensor in made_of]
        return cls(values, layer.precision, torch.is_grad_enabled(), made_of, versions)

    def serves(self, layer: QuantLayer) -> bool:
        """Whether the layer would get the same now."""
        if torch.is_grad_enabled() != self.with_gradient or layer.precision != self.precision:
            return False
        now = _made_of(layer)
        return (
            len(now) == len(self.made_of)
            and all(tensor is known for tensor, known in zip(now, self.made_of, strict=True))
            and [version(tensor) for tensor in now] == self.versions
        )


class QuantConv2d(nn.Conv2d):
    """`nn.Conv2d` that quantizes its weight and its input to the widths in `precision` (float at first).

    Padding is added to the quantized input, so it stays an exact zero.
    """

    weight_quantizer: WeightQuantizer
    activation_quantizer: ActivationQuantizer
    precision: Precision
    scheduled: bool
    """whether a plan may change `precision`; an override with a width of its own says no"""
    held_weight: HeldWeight | None = None
    """see `lbdet.convert.hold_weights`"""
    channel_dim = -3
    """of the input"""

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        weight_quantizer: WeightQuantizer,
        activation_quantizer: ActivationQuantizer | None = None,
    ) -> QuantConv2d:
        """Wrap `conv`; its parameters are shared, not copied. Inputs are uniform unless given otherwise."""
        return _twin(cls, conv, weight_quantizer, activation_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(quantized_input(self, input), quantized_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class QuantLinear(nn.Linear):
    """`nn.Linear` that quantizes its weight and its input to the widths in `precision` (float at first)."""

    weight_quantizer: WeightQuantizer
    activation_quantizer: ActivationQuantizer
    precision: Precision
    scheduled: bool
    held_weight: HeldWeight | None = None
    channel_dim = -1

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        weight_quantizer: WeightQuantizer,
        activation_quantizer: ActivationQuantizer | None = None,
    ) -> QuantLinear:
        """Wrap `linear`; its parameters are shared, not copied. Inputs are uniform unless given otherwise."""
        return _twin(cls, linear, weight_quantizer, activation_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(quantized_input(self, input), quantized_weight(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


QuantLayer = QuantConv2d | QuantLinear
LayerT = TypeVar("LayerT", QuantConv2d, QuantLinear)


def quantized_weight(layer: QuantLayer) -> Tensor:
    """Return the weight that the layer computes with now:
    the float parameter itself, or its fake-quantized values.
    """
    if layer.held_weight is not None and layer.held_weight.serves(layer):
        return layer.held_weight.values
    bits = layer.precision.weight_bits
    return layer.weight if bits is None else layer.weight_quantizer(layer.weight, bits)


def quantized_input(layer: QuantLayer, input: Tensor) -> Tensor:
    """Return the input that the layer computes with now: `input` itself, or its fake-quantized values.

    Raises:
        UserError: activations are to be quantized and were not calibrated.
    """
    bits = layer.precision.act_bits
    return input if bits is None else layer.activation_quantizer(input, bits, layer.channel_dim)


def rebind_hooks(layer: QuantLayer) -> None:
    """Let hooks that hold their module weakly (those of `load_state_dict`) hold this one."""
    for hook in layer._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(layer)


def _made_of(layer: QuantLayer) -> list[Tensor]:
    """Return the tensors that a quantized weight depends on."""
    quantizer = layer.weight_quantizer
    return [layer.weight, *quantizer.parameters(), *quantizer.buffers()]


def _twin(
    cls: type[LayerT],
    original: nn.Conv2d | nn.Linear,
    weight_quantizer: WeightQuantizer,
    activation_quantizer: ActivationQuantizer | None,
) -> LayerT:
    """Return a layer with all that `original` has. Hooks stay in the same dicts, where their handles look."""
    layer = cls.__new__(cls)
    state = original.__getstate__()
    own = {name: state[name].copy() for name in ("_parameters", "_buffers", "_modules")}
    layer.__setstate__(state | own)
    layer.weight_quantizer = weight_quantizer
    layer.activation_quantizer = activation_quantizer or UniformActivation()
    layer.precision, layer.scheduled = FLOAT, True
    return layer.train(original.training)
