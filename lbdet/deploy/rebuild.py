"""From a packed model to one that runs: a float model with the weights that were evaluated.

A weight is what it dequantizes to, so layers are ordinary ones; only those whose inputs are rounded stay
quantized layers, with float weights. The outputs are those of the model that was packed, bit for bit, unless
batch norm was folded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbdet.convert import set_precision
from lbdet.deploy.packed import PackedInput, PackedModel
from lbdet.errors import UserError
from lbdet.models.weights import Weights, check_fit, load_into
from lbdet.nn import (
    ActivationQuantizer,
    BinaryActivation,
    DorefaActivation,
    LbwWeight,
    QuantConv2d,
    QuantLinear,
    UniformActivation,
)
from lbdet.precision import Precision
from lbdet.quant import uniform

_SWAPS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}


class StoredRange(UniformActivation):
    """Equally spaced values whose range came from a file: a scale that is known to the last bit."""

    scale: Tensor

    def __init__(self, scale: float, low: int, bits: int) -> None:
        super().__init__(update="fixed")
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.low, self.bits = low, bits

    def prepare(self, bits: int, device: torch.device) -> None:
        """Do nothing: there is the one range."""

    def calibrated(self, bits: int) -> bool:
        return bits == self.bits

    def range(self, bits: int) -> tuple[float, int, int] | None:
        return (self.scale.item(), self.low, self.low + (1 << bits) - 1) if bits == self.bits else None

    def forward(self, x: Tensor, bits: int, dim: int) -> Tensor:
        self._check_calibrated(bits)
        return uniform.fake_quantize(x, self.scale, self.low, self.low + (1 << bits) - 1)


def rebuild(packed: PackedModel, model: nn.Module) -> nn.Module:
    """Give a float model the weights and input ranges of a file.

    Args:
        packed: what `load_packed` read.
        model: new, of `packed.header.architecture` for as many classes, on the CPU; changed in place.

    Returns:
        The same model, in eval mode.

    Raises:
        UserError: the model is another than the packed one.
    """
    _remove_folded(packed, model)
    load_into(model, _weights(packed))
    for name, found in packed.inputs.items():
        layer = dict(model.named_modules()).get(name)
        if type(layer) not in _SWAPS:
            raise UserError(
                f"{packed.source}: {name!a} must be a float layer of the model, got {type(layer).__name__}; "
                "build the architecture that was packed"
            )
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        swapped = _SWAPS[type(layer)].from_float(layer, LbwWeight(), _INPUTS[found.format](found))
        model.set_submodule(name, swapped)
        set_precision(model, {name: Precision(None, found.bits)})
    return model.eval()


def check_architecture(packed: PackedModel, model: nn.Module) -> None:
    """Refuse a model that is another than the packed one, by the names and shapes of its tensors.

    Args:
        model: as `rebuild`'s, on any device, such as torch's "meta", where it takes no memory; changed.

    Raises:
        UserError: as `rebuild`.
    """
    _remove_folded(packed, model)
    check_fit(model, _weights(packed))


def _weights(packed: PackedModel) -> Weights:
    return Weights(dict(packed.tensors), str(packed.source), packed.header.classes, {})


def _remove_folded(packed: PackedModel, model: nn.Module) -> None:
    """Replace batch norms that the file has not by nothing, and give convolutions the biases that it has."""
    owners = {key.rpartition(".")[0] for key in packed.tensors}
    modules = dict(model.named_modules())
    norms = [
        n for n, m in modules.items() if isinstance(m, _BatchNorm) and m.state_dict() and n not in owners
    ]
    folded = [name for name, layer in packed.header.layers.items() if layer.folded]
    if len(norms) != len(folded):
        raise UserError(
            f"{packed.source}: must have the batch norms of the model, got {len(folded)} folded and "
            f"{len(norms)} not stored; build the architecture that was packed"
        )
    for name in norms:
        model.set_submodule(name, nn.Identity())
    for name in folded:
        conv = modules.get(name)
        if isinstance(conv, nn.Conv2d) and conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))


_INPUTS: dict[str, Callable[[PackedInput], ActivationQuantizer]] = {
    "uniform": lambda found: StoredRange(found.scale or 0.0, found.low or 0, found.bits),
    "dorefa": lambda found: DorefaActivation(found.clip or 0.0),
    "binary": lambda _: BinaryActivation(),
}
