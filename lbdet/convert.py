"""Turn a float model into a quantized one, change its widths, and say what became of every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lbdet.errors import UserError, closest
from lbdet.nn import FORMATS, QuantConv2d, QuantLayer, QuantLinear, WeightQuantizer
from lbdet.nn.batch_norm import recalibrate_bn, shift_statistics, statistics
from lbdet.precision import FLOAT, Precision

_SWAPS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class WeightFormat:
    """A number format by its name in `FORMATS`,
    with the arguments of its quantizer (solver, granularity, ...).
    """

    name: str = "lbw"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> WeightQuantizer:
        """Return a new quantizer module.

        Raises:
            UserError: an unknown format, or an option it does not have.
        """
        if self.name not in FORMATS:
            raise UserError(f"format {self.name!r} is unknown; formats: {', '.join(FORMATS)}")
        try:
            return FORMATS[self.name](**self.options)
        except TypeError as error:
            raise UserError(f"format {self.name!r}: {error}") from None


@dataclass(frozen=True)
class Override:
    """What the layers whose names match `pattern` have instead of the model's format or width."""

    pattern: str
    precision: Precision | None = None
    """fixed: plans leave it alone; `None` = as scheduled"""
    weight: WeightFormat | None = None


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
    symbols: int | None = None
    """different codes in use"""
    zeros: float | None = None
    """share of codes that are 0"""
    squared_error: float | None = None
    """||W - W_q||^2 / ||W||^2"""
    reason: str | None = None
    """why the layer is float"""


def quantize_model(
    model: nn.Module,
    precision: Precision | str = "W4",
    weight: WeightFormat | None = None,
    overrides: Sequence[Override] = (),
    keep_float: Sequence[str] = (),
) -> tuple[nn.Module, list[LayerCoverage]]:
    """Swap every `nn.Conv2d` and `nn.Linear` for its quantized twin, and print how many were.

    The model is changed in place: the twins share the parameters, so an optimizer made before stays valid.
    Layers are swapped by exact type; subclasses of other libraries stay float and the coverage says so.

    Args:
        model: any module with at least one such layer inside.
        precision: the width of all layers without one of their own; `Precision()` or "float" keeps float32.
        weight: their number format, LBW by default.
        overrides: patterns (`fnmatch`, on module names) with another width or format; the last match wins.
        keep_float: patterns of layers that are not swapped at all; they win over overrides.

    Returns:
        The same model, and the coverage report, one entry a layer in the model's order.

    Raises:
        UserError: a pattern that matches no layer, a width that a format does not have, an unknown format,
            a model that has no layers to swap or is one itself.

    >>> model, report = quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), "W2")
    converted 2/2 layers, 232 of 232 weights
    """
    names = [name for name, module in model.named_modules() if _is_swappable(module)]
    _check_has_layers(model, names)
    for pattern in [*keep_float, *(o.pattern for o in overrides)]:
        _matching(pattern, names)
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in keep_float):
            continue
        matching = [o for o in overrides if fnmatchcase(name, o.pattern)]
        quantizer = next((o.weight for o in reversed(matching) if o.weight), weight or WeightFormat()).build()
        fixed = next((o.precision for o in reversed(matching) if o.precision), None)
        layer = _swap(model, name, quantizer)
        layer.scheduled = fixed is None
        if fixed is not None:
            set_precision(model, {name: fixed})
    set_scheduled_precision(model, precision)
    report = coverage(model, keep_float)
    print(coverage_summary(report))
    return model, report


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers by name, whatever their width is now."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


def scheduled_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers whose width a plan sets; the others have one of their own."""
    return [name for name, layer in quantized_layers(model).items() if layer.scheduled]


def set_precision(model: nn.Module, precision: Mapping[str, Precision]) -> None:
    """Change the widths of a live model; layers that are not named keep theirs.

    Raises:
        UserError: a name that is no quantized layer, or a width that the layer's format does not have.
    """
    layers = quantized_layers(model)
    for name, wanted in precision.items():
        if name not in layers:
            raise UserError(f"set_precision: {name!r} is no quantized layer{closest(name, layers)}")
        if layers[name].precision != wanted:
            check_width(layers[name].weight_quantizer, wanted, name)
            layers[name].precision = wanted


def set_scheduled_precision(model: nn.Module, precision: Precision | str) -> None:
    """Give all scheduled layers one width; those with a width of their own keep it."""
    wanted = Precision.parse(precision) if isinstance(precision, str) else precision
    set_precision(model, dict.fromkeys(scheduled_layers(model), wanted))


def set_float(model: nn.Module) -> None:
    """Give every quantized layer float32 weights, those with a width of their own too:
    the float model again.
    """
    set_precision(model, dict.fromkeys(quantized_layers(model), FLOAT))


def correct_bn(model: nn.Module, batches: Callable[[], Iterable[Sequence[Tensor] | Tensor]]) -> int:
    """Adapt batch norm's running statistics to the error of the weights, before any training.

    Afterwards a channel leaves batch norm with the mean and variance that it has in the float model on
    the same images. Estimating the statistics anew (`recalibrate_bn`) would also replace what the
    detector learnt of its own, larger and augmented training data; here only the difference between float
    and the present precision counts. Meant for weights that were trained at float: after training at low
    precision the float pass has no meaning.

    Reference:
        In the spirit of bias correction (Nagel et al. 2019, arXiv 1906.04721), with variances too.

    Args:
        batches: called twice, gives the same batches each time: what `model` takes in eval mode,
            on its device.

    Returns:
        The number of images.
    """
    own = {name: layer.precision for name, layer in quantized_layers(model).items()}
    stored = statistics(model)
    set_float(model)
    recalibrate_bn(model, batches())
    before = statistics(model)
    set_precision(model, own)
    images = recalibrate_bn(model, batches())
    shift_statistics(model, stored, before, statistics(model))
    return images


def check_width(quantizer: WeightQuantizer, precision: Precision, where: str) -> None:
    """Refuse a precision that a format cannot do.

    Raises:
        UserError: naming `where`, the format and its widths.
    """
    bits, widths = precision.weight_bits, quantizer.widths
    if bits is not None and bits not in widths:
        raise UserError(
            f"{where}: format {quantizer.format!r} has no {bits}-bit weights, got {precision}; "
            f"it has W{widths[0]} to W{widths[-1]}"
        )
    if precision.act_bits is not None:
        raise UserError(f"{where}: activations stay float in this version, got {precision}; leave out the A")


def coverage(model: nn.Module, keep_float: Iterable[str] = ()) -> list[LayerCoverage]:
    """Report on every convolution and linear layer, at its width of the moment.

    Args:
        keep_float: the patterns given to `quantize_model`, to be named as the reason.
    """
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, _WEIGHTED))
    return [_layer_coverage(name, layer, tuple(keep_float)) for name, layer in layers]


def coverage_summary(report: Sequence[LayerCoverage]) -> str:
    """Return "converted N/M layers, ...", and a line for each layer that was not."""
    done = [r for r in report if r.format is not None]
    weights = sum(r.weights for r in done), sum(r.weights for r in report)
    lines = [f"converted {len(done)}/{len(report)} layers, {weights[0]} of {weights[1]} weights"]
    lines += [f"  float: {r.name} ({r.reason})" for r in report if r.format is None]
    return "\n".join(lines)


def model_bytes(model: nn.Module) -> int:
    """Return the size of the state dict in bytes, with quantized weights at the size of their packed codes.

    Everything else (batch norm, biases, float layers) counts as it is stored, four bytes a float32.
    """
    tensors = model.state_dict(keep_vars=True).values()  # not copies: one that is shared counts once
    stored = {id(tensor): 8 * tensor.numel() * tensor.element_size() for tensor in tensors}
    for layer in quantized_layers(model).values():
        bits = layer.precision.weight_bits
        if bits is not None:
            stored[id(layer.weight)] = layer.weight_quantizer.stored_bits(layer.weight, bits)
    return -(-sum(stored.values()) // 8)


def coverage_json(report: Sequence[LayerCoverage]) -> list[dict[str, Any]]:
    """Return the report as plain data for `coverage.json`."""
    return [asdict(r) for r in report]


def _is_swappable(module: nn.Module) -> bool:
    return type(module) in _SWAPS


def _check_has_layers(model: nn.Module, names: Sequence[str]) -> None:
    kind = type(model).__name__
    if not names:
        raise UserError(
            f"model: must have float nn.Conv2d or nn.Linear, got none in {kind}; give a float model"
        )
    if "" in names:
        raise UserError(f"model: layers must be inside it, got a bare {kind}; wrap it in nn.Sequential")


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(
            f"pattern {pattern!r} matches none of the {len(names)} layers"
            f"{closest(pattern.rstrip('*.'), names)}"
        )
    return found


def _swap(model: nn.Module, name: str, quantizer: WeightQuantizer) -> QuantLayer:
    original = model.get_submodule(name)
    layer = _SWAPS[type(original)].from_float(original, quantizer)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():  # named_children skips the second name of a layer
            if module is original:
                setattr(parent, child, layer)
    return layer


def _why_float(name: str, layer: nn.Module, keep_float: tuple[str, ...]) -> str:
    pattern = next((p for p in keep_float if fnmatchcase(name, p)), None)
    if pattern is not None:
        return f"keep_float {pattern!r}"
    if _is_swappable(layer):
        return "not converted"
    return f"type {type(layer).__name__} has no quantized twin"


@torch.no_grad()
def _layer_coverage(name: str, layer: nn.Module, keep_float: tuple[str, ...]) -> LayerCoverage:
    kind = "linear" if isinstance(layer, nn.Linear) else type(layer).__name__.removeprefix("Quant").lower()
    assert isinstance(layer.weight, Tensor)
    base = LayerCoverage(name, kind, tuple(layer.weight.shape), layer.weight.numel(), None)
    if not isinstance(layer, (QuantConv2d, QuantLinear)):
        return replace(base, reason=_why_float(name, layer, keep_float))
    quantizer, bits = layer.weight_quantizer, layer.precision.weight_bits
    base = replace(base, format=quantizer.format, solver=quantizer.solver, granularity=quantizer.granularity)
    if bits is None:
        return replace(base, reason="its precision is float now")
    quantized = quantizer.quantize(layer.weight, bits)
    weight, norm = layer.weight.double(), layer.weight.double().square().sum().item()
    error = (quantized.dequantize().double() - weight).square().sum().item()
    return replace(
        base,
        bits=bits,
        symbols=quantized.codes.unique().numel(),
        zeros=(quantized.codes == 0).double().mean().item(),
        squared_error=error / norm if norm > 0 else 0.0,
    )
