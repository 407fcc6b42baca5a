"""Turn a float model into a quantized one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from lbdet.convert.layers import set_precision, set_scheduled_precision
from lbdet.convert.report import LayerCoverage, coverage, coverage_summary
from lbdet.errors import UserError, closest
from lbdet.nn import FORMATS, ActivationQuantizer, QuantConv2d, QuantLayer, QuantLinear, WeightQuantizer
from lbdet.precision import Precision

_SWAPS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


@dataclass(frozen=True)
class WeightFormat:
    """A number format of weights by its name in `FORMATS`, with the arguments of its quantizer."""

    name: str = "lbw"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> WeightQuantizer:
        """Return a new quantizer module.

        Raises:
            UserError: an unknown format, or an option it does not have.
        """
        known = {name: format.weight for name, format in FORMATS.items() if format.weight}
        return _build(self.name, known, self.options, "weights")


@dataclass(frozen=True)
class ActivationFormat:
    """A number format of layer inputs by its name in `FORMATS`, with the arguments of its quantizer."""

    name: str = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> ActivationQuantizer:
        """Return a new quantizer module, not calibrated.

        Raises:
            UserError: an unknown format, one of weights only, or an option it does not have.
        """
        known = {name: format.activation for name, format in FORMATS.items() if format.activation}
        return _build(self.name, known, self.options, "activations")


@dataclass(frozen=True)
class Override:
    """What the layers whose names match `pattern` have instead of the model's formats or width."""

    pattern: str
    precision: Precision | None = None
    """fixed: plans leave it alone; `None` = as scheduled"""
    weight: WeightFormat | None = None
    activation: ActivationFormat | None = None


def quantize_model(
    model: nn.Module,
    precision: Precision | str = "W4",
    weight: WeightFormat | None = None,
    activation: ActivationFormat | None = None,
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
        activation: the number format of their inputs where the width has act bits, uniform by default. The
            ranges are set by `calibrate_activations`, without which such a model refuses to run.
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
        matching = [o for o in reversed(overrides) if fnmatchcase(name, o.pattern)]
        weights = next((o.weight for o in matching if o.weight), weight or WeightFormat())
        inputs = next((o.activation for o in matching if o.activation), activation or ActivationFormat())
        fixed = next((o.precision for o in matching if o.precision), None)
        layer = _swap(model, name, weights.build(), inputs.build())
        layer.scheduled = fixed is None
        if fixed is not None:
            set_precision(model, {name: fixed})
    set_scheduled_precision(model, precision)
    report = coverage(model, keep_float)
    print(coverage_summary(report))
    return model, report


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


def _swap(
    model: nn.Module, name: str, weight_quantizer: WeightQuantizer, activation_quantizer: ActivationQuantizer
) -> QuantLayer:
    original = model.get_submodule(name)
    layer = _SWAPS[type(original)].from_float(original, weight_quantizer, activation_quantizer)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():  # named_children skips the second name of a layer
            if module is original:
                setattr(parent, child, layer)
    return layer


QuantizerT = TypeVar("QuantizerT", WeightQuantizer, ActivationQuantizer)


def _build(
    name: str, known: Mapping[str, type[QuantizerT]], options: Mapping[str, Any], kind: str
) -> QuantizerT:
    if name not in known:
        what = f"has no {kind}" if name in FORMATS else "is unknown"
        raise UserError(f"format {name!r} {what}; formats of {kind}: {', '.join(known)}")
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"format {name!r}: {error}") from None
