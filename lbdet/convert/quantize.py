"""Turn a float model into a quantized one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from lbdet.convert.layers import quantized_layers, set_widths
from lbdet.convert.report import LayerCoverage, coverage, coverage_summary, without_effect
from lbdet.errors import UserError, closest
from lbdet.nn import (
    FORMATS,
    ActivationQuantizer,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    WeightQuantizer,
    rebind_hooks,
)
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
    precision: Precision | str | None = None
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
    Layers are swapped by exact type; subclasses of other libraries stay float and the coverage says so. So do
    layers whose weights are read by another module, such as `nn.TransformerEncoderLayer`, or whose `forward`
    was replaced: a twin would change nothing. Layers of an earlier call stay as they are.

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
            a model that has no layers to swap or is one itself. Nothing is changed then.
        NumericsError: a weight that is not finite, of a format that is fitted to it; nothing is changed.

    >>> model, report = quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), "W2")
    converted 2/2 layers, 232 of 232 weights
    """
    originals = _swappable(model)
    layers = [name for name, module in model.named_modules() if type(module) in _SWAPS]
    _check_patterns(keep_float, overrides, layers)
    default = Override(
        "*", Precision.parse(precision), weight or WeightFormat(), activation or ActivationFormat()
    )
    twins: dict[str, QuantLayer] = {}
    widths: dict[str, Precision | str] = {}
    for name, original in originals.items():
        if not any(fnmatchcase(name, pattern) for pattern in keep_float):
            matching = [o for o in reversed(overrides) if fnmatchcase(name, o.pattern)]
            twins[name], widths[name] = _twin(original, [*matching, default])
    set_widths(twins, widths)
    _place(model, {originals[name]: twin for name, twin in twins.items()})
    report = coverage(model, keep_float)
    print(coverage_summary(report))
    return model, report


def _swappable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can have a twin by name, at least one."""
    unused = without_effect(model)
    found = {n: m for n, m in model.named_modules() if type(m) in _SWAPS and m not in unused}
    kind = type(model).__name__
    if not found and quantized_layers(model):
        raise UserError(
            f"model: must have layers to convert, got a {kind} that is already converted; "
            "use lbdet.set_precision"
        )
    if not found:
        raise UserError(
            f"model: must have float nn.Conv2d or nn.Linear, got none in {kind}; give a float model"
        )
    if "" in found:
        raise UserError(f"model: layers must be inside it, got a bare {kind}; wrap it in nn.Sequential")
    return found


def _check_patterns(keep_float: Sequence[str], overrides: Sequence[Override], names: Sequence[str]) -> None:
    parts = [name.split(".")[:i] for name in names for i in range(1, name.count(".") + 1)]
    groups = [".".join(part) + ".*" for part in parts]
    patterns = [("keep_float", p) for p in keep_float] + [("overrides", o.pattern) for o in overrides]
    for key, pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = closest(pattern, [*names, *groups])
            raise UserError(f"{key}: pattern {pattern!r} matches none of the {len(names)} layers{hint}")


def _twin(original: nn.Module, choices: Sequence[Override]) -> tuple[QuantLayer, Precision | str]:
    """Return the twin of a layer, at float, and the width that it is to have: of choices the first counts.

    The last choice has everything and stands for the model; a width of another one is fixed.
    """
    weight = next(o.weight for o in choices if o.weight)
    activation = next(o.activation for o in choices if o.activation)
    width, choice = next((o.precision, o) for o in choices if o.precision is not None)
    twin = _SWAPS[type(original)].from_float(original, weight.build(), activation.build())
    twin.scheduled = choice is choices[-1]
    return twin, width


def _place(model: nn.Module, twins: Mapping[nn.Module, QuantLayer]) -> None:
    """Put twins where their originals are, under every name that those have."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():  # named_children skips the second name of a layer
            if module is not None and module in twins:
                setattr(parent, child, twins[module])
    for twin in twins.values():
        rebind_hooks(twin)


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
