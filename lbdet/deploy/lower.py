"""From a quantized model as it was trained to one that an integer engine can run.

    trained                                    lowered
    input quantizer, bits, learned range       scale, uint8 zero point (and a clip below 8 bits)
    float weight, format, bits                 int8 codes, one float32 scale an output channel
    batch norm directly behind                 in the scale and the bias; codes negated where gamma < 0

Both compute the same numbers up to the order of float operations: y = sum(x_code * w_code) * scale + bias.
The integers are exact, so a layer differs by more than float's rounding only where an input lies so close to
the middle between two codes that it rounds to the other one.

With g = gamma / sqrt(var + eps), batch norm after a convolution with scale s and bias b is a convolution with

    scale |g| s,    codes sign(g) codes,    bias beta + g (b - mean).

Codes are then multiplied by the power of two that brings them up to 64, and the scale is divided by it: the
same weights, exactly. onnxruntime rounds the bias of a convolution to multiples of input scale times weight
scale, which is coarse where codes are small; and with codes beyond 64 the 16-bit sums of CPUs without VNNI
could overflow.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.convert import quantized_layers, uncalibrated
from lbdet.deploy.fold import batch_norm_pairs, factor_and_bias
from lbdet.deploy.integers import IntegerWeight, integer_weight
from lbdet.deploy.onnx_ops import dequantize, quantize_dequantize
from lbdet.errors import UserError
from lbdet.nn import DorefaActivation, QuantConv2d, QuantLayer, quantized_weight
from lbdet.quant.rows import per_row

_NO_BIAS = 1e-30
"""instead of none: OpenVINO 2026.4 gives zeros behind an int8 convolution without bias whose output is used
twice, where shapes depend on the image"""


_LARGEST_FINE, _SMALLEST_NORMAL = 64, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class InputGrid:
    """The values that a layer's input is rounded to: scale * (code - zero point), codes 0..steps."""

    scale: float
    zero_point: int
    steps: int


class _Lowered(nn.Module):
    """A layer of constants: the grid of its input, its weight (int8 codes and scales, or float32), a bias."""

    name: str
    """of the layer in the model that was lowered"""
    codes: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    input_scale: Tensor
    zero_point: Tensor

    def __init__(
        self, name: str, weight: IntegerWeight | Tensor, bias: Tensor | None, grid: InputGrid | None
    ) -> None:
        super().__init__()
        self.name = name
        integers = weight if isinstance(weight, IntegerWeight) else None
        self.register_buffer("codes", None if integers is None else self.layout(integers.codes))
        self.register_buffer("scale", None if integers is None else integers.scale)
        self.register_buffer("weight", None if isinstance(weight, IntegerWeight) else self.layout(weight))
        self.register_buffer("bias", bias)
        self.grid = grid
        if grid is not None:
            self.register_buffer("input_scale", torch.tensor(grid.scale))
            self.register_buffer("zero_point", torch.tensor(grid.zero_point, dtype=torch.uint8))

    def layout(self, weight: Tensor) -> Tensor:
        """Return a weight `[C, ...]` as the engines want it."""
        return weight

    def input_values(self, x: Tensor) -> Tensor:
        """Round an input to the grid, where there is one."""
        if self.grid is None:
            return x
        if self.grid.steps < 255:  # QuantizeLinear has the limits of uint8 alone
            low, high = -self.grid.zero_point, self.grid.steps - self.grid.zero_point
            x = x.clamp(low * self.grid.scale, high * self.grid.scale)
        return quantize_dequantize(x, self.input_scale, self.zero_point)

    def weight_values(self, axis: int) -> Tensor:
        """Return the weight as float32; `axis` is that of output channels."""
        if self.codes is None or self.scale is None:
            assert self.weight is not None
            return self.weight
        return dequantize(self.codes, self.scale, axis)


class LoweredConv2d(_Lowered):
    """A convolution of constants."""

    def __init__(
        self,
        name: str,
        conv: nn.Conv2d,
        weight: IntegerWeight | Tensor,
        bias: Tensor | None,
        grid: InputGrid | None,
    ) -> None:
        super().__init__(name, weight, bias, grid)
        self.stride, self.padding = conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.input_values(x), self.weight_values(0)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LoweredLinear(_Lowered):
    """A linear layer of constants; its weight is stored as `[in, out]`, which engines multiply as it is."""

    def layout(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        y = self.input_values(x) @ self.weight_values(1)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def lower(model: nn.Module, float_weights: bool = False) -> nn.Module:
    """Return the model with every quantized layer lowered, at its present width.

    Args:
        model: a detector or classifier with calibrated activations; not changed.
        float_weights: weights that do not fit int8 become float32 (their rounded values) instead of an error.

    Returns:
        A new model on the CPU, in eval mode. Layers that are not quantized are as they were.

    Raises:
        UserError: weights that do not fit int8; inputs of a format without a zero, or not calibrated; padding
            that engines do not have.
    """
    model = deepcopy(model).cpu().eval()
    if missing := uncalibrated(model):
        raise UserError(f"{missing[0]}: activations must be calibrated, got no range; calibrate them first")
    pairs, _ = batch_norm_pairs(model)
    for name, layer in quantized_layers(model).items():
        weight, bias = _weight(name, layer, float_weights), layer.bias
        if name in pairs and isinstance(weight, IntegerWeight):
            norm = model.get_submodule(pairs[name])
            assert isinstance(norm, nn.BatchNorm2d)
            weight, bias = fold(weight, bias, norm)
            _replace(model, norm, nn.Identity())
        weight = finer(weight) if isinstance(weight, IntegerWeight) else weight
        _replace(model, layer, _lowered(name, layer, weight, bias))
    return model


def lowered_layers(model: nn.Module) -> dict[str, LoweredConv2d | LoweredLinear]:
    """Return the lowered layers by where they are in a module, such as a graph around a lowered model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (LoweredConv2d, LoweredLinear))}


def int8_layers(model: nn.Module) -> list[str]:
    """Return the names of the lowered layers in a module that have int8 weights and uint8 inputs."""
    lowered = lowered_layers(model).values()
    return [layer.name for layer in lowered if layer.codes is not None and layer.grid is not None]


def input_grid(name: str, layer: QuantLayer) -> InputGrid | None:
    """Return the grid of a layer's input; None where it is float.

    Raises:
        UserError: the format has no zero.
    """
    bits, quantizer = layer.precision.act_bits, layer.activation_quantizer
    if bits is None:
        return None
    steps = (1 << bits) - 1
    if found := quantizer.range(bits):
        return InputGrid(found[0], -found[1], steps)
    if isinstance(quantizer, DorefaActivation) and isinstance(quantizer.clip, float):
        return InputGrid(quantizer.clip / steps, 0, steps)
    raise UserError(
        f"{name}: inputs of format {quantizer.format!r} have no zero, so engines cannot pad them; "
        "train with activation format uniform"
    )


def fold(weight: IntegerWeight, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[IntegerWeight, Tensor]:
    """Take batch norm into a weight and a bias, with codes unchanged or negated (see the top of the file).

    A channel that batch norm multiplies by 0 gets codes 0 and scale 1.
    """
    factor, bias = factor_and_bias(norm, bias)
    scale = (weight.scale.double() * factor.abs()).float()
    sign = torch.where(scale > 0, factor.sign(), 0).to(torch.int8)
    codes = weight.codes * per_row(sign, weight.codes.ndim)
    return IntegerWeight(codes, torch.where(scale > 0, scale, 1)), bias.float()


def finer(weight: IntegerWeight) -> IntegerWeight:
    """Multiply codes by a power of two, to at most 64, and divide the scale by it (why: top of the file)."""
    largest, least = int(weight.codes.int().abs().max()), float(weight.scale.min())
    factor = 1
    while largest and 2 * factor * largest <= _LARGEST_FINE and least / (2 * factor) >= _SMALLEST_NORMAL:
        factor *= 2
    return IntegerWeight(weight.codes * factor, weight.scale / factor)


def _lowered(
    name: str, layer: QuantLayer, weight: IntegerWeight | Tensor, bias: Tensor | None
) -> LoweredConv2d | LoweredLinear:
    grid = input_grid(name, layer)
    if bias is None or not bool(bias.any()):
        bias = torch.full((len(layer.weight),), _NO_BIAS)
    bias = bias.detach().clone()
    if not isinstance(layer, QuantConv2d):
        return LoweredLinear(name, weight, bias, grid)
    if layer.padding_mode != "zeros":
        raise UserError(f"{name}: padding must be zeros for export, got {layer.padding_mode!r}")
    return LoweredConv2d(name, layer, weight, bias, grid)


def _weight(name: str, layer: QuantLayer, float_weights: bool) -> IntegerWeight | Tensor:
    if layer.precision.weight_bits is not None:
        try:
            return integer_weight(name, layer)
        except UserError:
            if not float_weights:
                raise
    return quantized_weight(layer).detach().clone()


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place, or the places, of another."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():  # named_children skips the second name of a layer
            if module is old:
                setattr(parent, child, new)
