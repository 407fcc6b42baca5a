"""The quantized layers of a live model: find them, change their widths, keep their parameters in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lbdet.errors import UserError, closest
from lbdet.nn import (
    ActivationQuantizer,
    HeldWeight,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    WeightQuantizer,
)
from lbdet.precision import FLOAT, Precision


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers by name, whatever their width is now."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


def scheduled_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers whose width a plan sets; the others have one of their own."""
    return [name for name, layer in quantized_layers(model).items() if layer.scheduled]


def set_precision(model: nn.Module, precision: Mapping[str, Precision | str]) -> None:
    """Change the widths of a live model; layers that are not named keep theirs.

    A width that a layer sees for the first time gets its parameters now (a scale from the weights; the range
    of activations must be calibrated): an optimizer made before does not know them.

    Args:
        precision: by layer name; a layer that has several names is found by each.

    Raises:
        UserError: a name that is no quantized layer, what is no precision, or a width that a format does not
            have; nothing is changed then.
        NumericsError: a weight that is not finite, of a format that is fitted to it; all widths stay.
    """
    every_name = model.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in every_name if isinstance(m, (QuantConv2d, QuantLinear))}
    for name in precision:
        if name not in layers:
            raise UserError(f"set_precision: {name!r} is no quantized layer{closest(name, layers)}")
    set_widths(layers, precision)


def set_widths(layers: Mapping[str, QuantLayer], precision: Mapping[str, Precision | str]) -> None:
    """Give layers their widths by name, all or none.

    Raises:
        UserError, NumericsError: as `set_precision`.
    """
    wanted = {name: Precision.parse(value) for name, value in precision.items()}
    changed = {name: value for name, value in wanted.items() if layers[name].precision != value}
    for name, value in changed.items():
        check_width(layers[name].weight_quantizer, layers[name].activation_quantizer, value, name)
    for name, value in changed.items():
        _prepare(layers[name], value)
    for name, value in changed.items():
        layers[name].precision = value


def set_scheduled_precision(model: nn.Module, precision: Precision | str) -> None:
    """Give all scheduled layers one width; those with a width of their own keep it."""
    set_precision(model, dict.fromkeys(scheduled_layers(model), Precision.parse(precision)))


def set_float(model: nn.Module) -> None:
    """Give every quantized layer float32 weights and inputs, those with a width of their own too:
    the float model again.
    """
    set_precision(model, dict.fromkeys(quantized_layers(model), FLOAT))


def start_weights(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Set the parameters of weight quantizers anew, from the weights as they are, at present widths.

    Args:
        names: of layers; None = all.
    """
    for name, layer in quantized_layers(model).items():
        if layer.precision.weight_bits is not None and (names is None or name in names):
            layer.weight_quantizer.start(layer.weight, layer.precision.weight_bits)


def rescale_range(model: nn.Module, name: str, bits: int | None) -> bool:
    """Let a layer's activations clip at its present width where they clip at `bits`.

    Returns:
        Whether that could be done: not where one of the widths has no range.
    """
    layer = quantized_layers(model)[name]
    quantizer, now = layer.activation_quantizer, layer.precision.act_bits
    found = None if bits is None or now is None else quantizer.range(bits)
    if found is None or now is None:
        return False
    scale, low, high = found
    share = ((1 << now) - 1) / (high - low)
    quantizer.set_range(now, scale / share, round(low * share))
    return True


def settle(model: nn.Module) -> None:
    """Put learned levels in order and latent weights near them; call it after each update of an optimizer."""
    for layer in quantized_layers(model).values():
        if layer.precision.weight_bits is not None:
            layer.weight_quantizer.settle(layer.weight, layer.precision.weight_bits)


@contextmanager
def hold_weights(model: nn.Module) -> Iterator[None]:
    """Quantize all weights once, and not at each use inside: for forward passes without gradients, or
    for one with them.

    One that changes meanwhile, or whose layer gets another width, is quantized anew (`lbdet.nn.HeldWeight`).
    """
    layers = [layer for layer in quantized_layers(model).values() if layer.precision.weight_bits is not None]
    try:
        for layer in layers:
            layer.held_weight = HeldWeight.of(layer)
        yield
    finally:
        for layer in layers:
            layer.held_weight = None


def quantization_losses(model: nn.Module) -> dict[str, Tensor]:
    """Return the extra loss that forward passes left since the last call, `{}` where there is none.

    It is the mean over layers of the objective, `[]`, and trains nothing but ranges of activations.
    """
    penalties = [layer.activation_quantizer.pop_penalty() for layer in quantized_layers(model).values()]
    found = [penalty for penalty in penalties if penalty is not None]
    return {"quantization": sum(found, found[0].new_zeros(())) / len(found)} if found else {}


def check_width(
    weight: WeightQuantizer, activation: ActivationQuantizer, precision: Precision, where: str
) -> None:
    """Refuse a precision that a format cannot do.

    Raises:
        UserError: naming `where`, the format and its widths.
    """
    for quantizer, bits, kind in (
        (weight, precision.weight_bits, "weights"),
        (activation, precision.act_bits, "activations"),
    ):
        letter, widths = kind[0].upper(), quantizer.widths
        if bits is not None and bits not in widths:
            first, last = f"{letter}{widths[0]}", f"{letter}{widths[-1]}"
            raise UserError(
                f"{where}: format {quantizer.format!r} has no {bits}-bit {kind}, got {precision}; "
                f"it has {first}" + ("" if first == last else f" to {last}")
            )


def _prepare(layer: QuantLayer, precision: Precision) -> None:
    if precision.weight_bits is not None and not layer.weight_quantizer.started(precision.weight_bits):
        layer.weight_quantizer.start(layer.weight, precision.weight_bits)
    if precision.act_bits is not None:
        layer.activation_quantizer.prepare(precision.act_bits, layer.weight.device)
