"""What a model needs to know from data before it can be trained or used at a precision, without gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from lbdet.convert.layers import quantized_layers, set_float, set_precision
from lbdet.errors import UserError
from lbdet.nn import QuantLayer
from lbdet.nn.batch_norm import batch_statistics, recalibrate_bn, set_statistics, shift_statistics, statistics
from lbdet.precision import Precision
from lbdet.quant.activations import BucketSums, ChannelStatistics, fit_range

log = logging.getLogger(__name__)

Batches = Callable[[], Iterable[Sequence[Tensor] | Tensor]]
"""Gives the same batches at each call: what the model takes in eval mode, on its device."""


def correct_bn(model: nn.Module, batches: Batches) -> int:
    """Adapt batch norm's running statistics to the error of the weights, before any training.

    Estimating the statistics anew (`recalibrate_bn`) would also replace what the detector learnt of its own,
    larger and augmented training data. So it is done twice, at float and at the present precision, and only
    the difference counts. A channel leaves the first batch norm of a path with the mean and variance that it
    has in the float model on the same images; the later ones not exactly, as in both estimates the layers in
    front normalise by these images' statistics and not by those that they will have. Activations are
    float throughout. Meant for weights that were trained at float: after training at low precision the
    float pass has no meaning.

    Reference:
        In the spirit of bias correction (Nagel et al. 2019, arXiv 1906.04721), with variances too.

    Args:
        batches: called twice.

    Returns:
        The number of images.

    Raises:
        UserError: another number of images at the second call. The model is as before then, and after any
            other error.
    """
    own = {name: layer.precision for name, layer in quantized_layers(model).items()}
    stored = statistics(model)
    try:
        set_float(model)
        images = recalibrate_bn(model, _called(batches))
        before = statistics(model)
        set_precision(model, _float_inputs(own))
        _check_same(images, recalibrate_bn(model, _called(batches)))
        after = statistics(model)
    finally:
        set_statistics(model, stored)
        set_precision(model, own)
    shift_statistics(model, stored, before, after)
    return images


@torch.no_grad()
def calibrate_activations(
    model: nn.Module,
    batches: Batches,
    use_batch_statistics: bool = False,
    names: Collection[str] | None = None,
) -> int:
    """Set the range of every layer's input that has one, at the present precision.

    All ranges are found at once, on the inputs that the model has with float activations and its weights as
    they are. The order of images and batches makes no difference.

    Args:
        model: a detector or classifier. A layer that no batch reaches gets the range of a zero input.
        batches: called twice; not at all where no layer needs a range.
        use_batch_statistics: normalise by the batch, for a model that is going to be trained that way and
            whose running statistics do not fit its quantized weights yet.
        names: of the layers whose range is set; the inputs of the others stay as they are. None = all.

    Returns:
        The number of images.

    Raises:
        NumericsError: an input that is not finite.
        UserError: no images, or another number of them at the second call; inputs that are never negative,
            of a format that keeps nothing but the sign.
    """
    layers = {
        name: layer
        for name, layer in quantized_layers(model).items()
        if _depends_on_data(layer) and (names is None or name in names)
    }
    if not layers:
        return 0
    own = {name: layer.precision for name, layer in layers.items()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    set_precision(model, _float_inputs(own))
    try:
        with batch_statistics(model) if use_batch_statistics else nullcontext():
            seen = {name: ChannelStatistics() for name in layers}
            images = _observe(model, _called(batches), layers, seen)
            if not images:
                raise UserError("batches: must give images, got none; give some that the model is for")
            _check_signs(layers, seen)
            objectives = {name: layer.activation_quantizer.objective for name, layer in layers.items()}
            sums = {name: BucketSums(seen[name].weights(o)) for name, o in objectives.items() if o}
            if sums:
                _check_same(images, _observe(model, _called(batches), layers, sums))
    finally:
        set_precision(model, own)
        for module, training in modes:
            module.training = training
    for name, found in sums.items():
        bits = own[name].act_bits
        assert bits is not None
        layers[name].activation_quantizer.set_range(bits, *fit_range(found, bits))
    return images


def uncalibrated(model: nn.Module) -> list[str]:
    """Return the names of the layers whose activations need a range and have none."""
    return [
        name
        for name, layer in quantized_layers(model).items()
        if layer.precision.act_bits and not layer.activation_quantizer.calibrated(layer.precision.act_bits)
    ]


def _called(batches: Batches) -> Iterable[Sequence[Tensor] | Tensor]:
    if not callable(batches):
        kind = type(batches).__name__
        raise UserError(f"batches: must be a function that returns them, got {kind}; write lambda: images")
    return batches()


def _check_same(first: int, second: int) -> None:
    if first != second:
        raise UserError(
            f"batches: must give the same images at each call, got {first} then {second}; "
            "start from the first one at each"
        )


def _depends_on_data(layer: QuantLayer) -> bool:
    quantizer = layer.activation_quantizer
    return layer.precision.act_bits is not None and (
        quantizer.objective is not None or quantizer.clips_negative or quantizer.needs_negative
    )


def _check_signs(layers: dict[str, QuantLayer], seen: dict[str, ChannelStatistics]) -> None:
    """Refuse binary activations behind a ReLU, and tell where negative inputs get lost."""
    lowest = {name: min(seen[name].minimum.tolist(), default=0.0) for name in layers}
    constant = [n for n, x in layers.items() if x.activation_quantizer.needs_negative and lowest[n] >= 0]
    if constant:
        raise UserError(
            f"{constant[0]} and {len(constant) - 1} other layers: format 'binary' keeps the sign of inputs, "
            "but these are never negative (behind a ReLU); use format 'uniform', which has 1 bit too"
        )
    clipped = [n for n, x in layers.items() if x.activation_quantizer.clips_negative and lowest[n] < 0]
    if clipped:
        log.info("%d layers have negative inputs, which become 0: %s, ...", len(clipped), clipped[0])


def _float_inputs(own: dict[str, Precision]) -> dict[str, Precision]:
    return {name: Precision(precision.weight_bits) for name, precision in own.items()}


def _observe(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor] | Tensor],
    layers: dict[str, QuantLayer],
    observers: dict[str, ChannelStatistics] | dict[str, BucketSums],
) -> int:
    """Run the model on all batches while observers see the inputs of layers; return the number of images."""
    images = 0
    with ExitStack() as stack:
        for name, observer in observers.items():
            hook = layers[name].register_forward_pre_hook(_observer(layers[name], observer))
            stack.callback(hook.remove)
        for batch in batches:
            model(batch)
            images += len(batch)
    return images


def _observer(
    layer: QuantLayer, observer: ChannelStatistics | BucketSums
) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
        lost = isinstance(observer, BucketSums) and layer.activation_quantizer.clips_negative
        observer.update(inputs[0].clamp_min(0) if lost else inputs[0], layer.channel_dim)

    return see
