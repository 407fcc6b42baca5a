"""What became of every layer: its width, format and error, or why it is float; and the bytes it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lbdet.convert.layers import quantized_layers
from lbdet.nn import QuantConv2d, QuantLayer, QuantLinear

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_READ_WEIGHTS = {
    "torch.nn.modules.transformer.TransformerEncoderLayer",  # without gradients
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
}
"""modules that compute with the weights of their layers and do not call them"""


@dataclass(frozen=True)
class LayerCoverage:
    """What became of one convolution or linear layer."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    bits: int | None
    """width of a stored code; None = float32"""
    format: str | None = None
    solver: str | None = None
    granularity: str | None = None
    stored_bits: int | None = None
    """of the packed codes and the scales, or of the float weights"""
    levels: tuple[float, ...] | None = None
    """the sorted representable values, at scale 1 where there is one; means where channels have their own"""
    counts: tuple[int, ...] | None = None
    """how many weights have each level"""
    symbols: int | None = None
    """different codes in use"""
    zeros: float | None = None
    """share of weights that become 0"""
    squared_error: float | None = None
    """||W - W_q||^2 / ||W||^2"""
    act_bits: int | None = None
    """width of the input's code; None = float32"""
    act_format: str | None = None
    act_scale: float | None = None
    act_low: int | None = None
    """lowest code of the input around zero; None = no range, or not calibrated"""
    reason: str | None = None
    """why the weights are float"""


def coverage(model: nn.Module, keep_float: Iterable[str] = ()) -> list[LayerCoverage]:
    """Report on every convolution and linear layer, at its width of the moment.

    Args:
        keep_float: the patterns given to `quantize_model`, to be named as the reason.
    """
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, _WEIGHTED))
    unused = without_effect(model)
    return [_layer_coverage(name, layer, tuple(keep_float), unused.get(layer)) for name, layer in layers]


def without_effect(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers whose `forward` is not what the model computes with, and why; others too.

    A quantized twin of theirs would change nothing.
    """
    found = {m: "its forward was replaced" for m in model.modules() if "forward" in vars(m)}
    for module in model.modules():
        if any(f"{cls.__module__}.{cls.__name__}" in _READ_WEIGHTS for cls in type(module).__mro__):
            found |= dict.fromkeys(module.children(), f"{type(module).__name__} reads its weight directly")
    return found


def coverage_summary(report: Sequence[LayerCoverage]) -> str:
    """Return "converted N/M layers, ...", and a line for each layer that was not."""
    done = [r for r in report if r.format is not None]
    weights = sum(r.weights for r in done), sum(r.weights for r in report)
    lines = [f"converted {len(done)}/{len(report)} layers, {weights[0]} of {weights[1]} weights"]
    lines += [f"  float: {r.name} ({r.reason})" for r in report if r.format is None]
    return "\n".join(lines)


def model_bytes(model: nn.Module) -> int:
    """Return the size of the state dict in bytes, with quantized weights at the size of their packed codes.

    Everything else (batch norm, biases, float layers, ranges of activations) counts as it is stored, four
    bytes a float32; parameters of quantizers for widths that are not in use do not count.
    """
    tensors = model.state_dict(keep_vars=True).values()  # not copies: one that is shared counts once
    stored = {id(tensor): 8 * tensor.numel() * tensor.element_size() for tensor in tensors}
    for layer in quantized_layers(model).values():
        for quantizer in (layer.weight_quantizer, layer.activation_quantizer):
            stored |= {id(tensor): 0 for tensor in quantizer.state_dict(keep_vars=True).values()}
        bits, act_bits = layer.precision.weight_bits, layer.precision.act_bits
        if bits is not None:
            stored[id(layer.weight)] = layer.weight_quantizer.stored_bits(layer.weight, bits)
        if act_bits is not None and layer.activation_quantizer.objective is not None:
            stored[id(layer)] = 32 + 8  # a scale and a zero point
    return -(-sum(stored.values()) // 8)


def coverage_json(report: Sequence[LayerCoverage]) -> list[dict[str, Any]]:
    """Return the report as plain data for `coverage.json`."""
    return [asdict(r) for r in report]


def _why_float(name: str, layer: nn.Module, keep_float: tuple[str, ...], unused: str | None) -> str:
    pattern = next((p for p in keep_float if fnmatchcase(name, p)), None)
    if pattern is not None:
        return f"keep_float {pattern!r}"
    if type(layer) in (nn.Conv2d, nn.Linear):
        return unused or "not converted"
    return f"type {type(layer).__name__} has no quantized twin"


@torch.no_grad()
def _layer_coverage(
    name: str, layer: nn.Module, keep_float: tuple[str, ...], unused: str | None
) -> LayerCoverage:
    kind = "linear" if isinstance(layer, nn.Linear) else type(layer).__name__.removeprefix("Quant").lower()
    assert isinstance(layer.weight, Tensor)
    shape, weights = tuple(layer.weight.shape), layer.weight.numel()
    base = LayerCoverage(name, kind, shape, weights, None, stored_bits=32 * weights)
    if not isinstance(layer, (QuantConv2d, QuantLinear)):
        return replace(base, reason=_why_float(name, layer, keep_float, unused))
    quantizer, bits = layer.weight_quantizer, layer.precision.weight_bits
    base = replace(base, format=quantizer.format, solver=quantizer.solver, granularity=quantizer.granularity)
    base = _with_input(base, layer)
    if bits is None:
        return replace(base, reason="its precision is float now")
    quantized = quantizer.quantize(layer.weight, bits)
    weight, norm = layer.weight.double(), layer.weight.double().square().sum().item()
    dequantized = quantized.dequantize().double()
    error = (dequantized - weight).square().sum().item()
    levels = quantized.levels.view(-1, quantized.levels.shape[-1])
    counts = quantized.level_index.flatten().bincount(minlength=levels.shape[1]).tolist()
    return replace(
        base,
        bits=bits,
        stored_bits=quantizer.stored_bits(layer.weight, bits),
        levels=tuple(levels.mean(0).tolist()),
        counts=tuple(counts),
        symbols=sum(count > 0 for count in counts),
        zeros=(dequantized == 0).double().mean().item(),
        squared_error=error / norm if norm > 0 else 0.0,
    )


def _with_input(report: LayerCoverage, layer: QuantLayer) -> LayerCoverage:
    bits, quantizer = layer.precision.act_bits, layer.activation_quantizer
    if bits is None:
        return report
    scale, low, _ = quantizer.range(bits) or (None, None, None)
    return replace(report, act_bits=bits, act_format=quantizer.format, act_scale=scale, act_low=low)
