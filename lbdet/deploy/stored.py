"""What does a file hold of a weight, and what does that stand for?

Symbols (which of the sorted levels each weight has, 0 .. L - 1), which are packed, and a few vectors:

    format          unit of a symbol             vectors                          weight
    lbw             0, +-1, +-2, .. +-2^(n-1)    exponents s                      2^(s-n+1) * unit
    uniform         the code                     scales; zero_points if affine    scale * (unit - zero_point)
    dorefa          (2 code + 1) / (2^bits - 1)  scales                           scale * unit
    binary          -1, 1                        scales                           scale * unit
    learned_levels  -                            levels (the upper half if        level
                                                 symmetric)
    batch norm folded                            scales, biases                   as above, times the factor

Vectors have one entry a tensor or one a channel; with batch norm folded there is always a scale a channel,
and 2^(s-n+1) is a part of it. Every product is of two float32 numbers and rounded once: all machines agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lbdet.deploy.header import PackedLayer
from lbdet.deploy.radix import Radix, radix_of
from lbdet.errors import UserError
from lbdet.nn import LearnedLevelsWeight, Quantized, QuantLayer, UniformWeight
from lbdet.quant import binary, dorefa, lbw, learned_levels, uniform
from lbdet.quant.pow2 import pow2

VECTORS = {
    "exponents": torch.int8, "scales": torch.float32, "zero_points": torch.int8, "levels": torch.float32,
    "biases": torch.float32, "frequencies": torch.int16, "input_scales": torch.float32,
    "input_lows": torch.int16,
}  # fmt: skip
"""name -> dtype; in the file each is joined over all layers"""


@dataclass(frozen=True)
class Stored:
    """A weight as a file holds it, apart from the packing of its symbols."""

    symbols: Tensor
    """uint8 `[N]`"""
    vectors: Mapping[str, Tensor]
    """some of `VECTORS`, `[n]` each"""


def described(name: str, layer: QuantLayer, coder: str = "radix", folded: bool = False) -> PackedLayer:
    """Describe a layer at its present width."""
    quantizer, inputs, precision = layer.weight_quantizer, layer.activation_quantizer, layer.precision
    packed = PackedLayer(
        name=name,
        shape=tuple(layer.weight.shape),
        input_format=None if precision.act_bits is None else inputs.format,
        input_bits=precision.act_bits,
    )
    if precision.weight_bits is None:
        return packed
    halves = isinstance(quantizer, (UniformWeight, LearnedLevelsWeight)) and quantizer.symmetric
    return replace(
        packed, format=quantizer.format, bits=precision.weight_bits, granularity=quantizer.granularity,
        symmetric=halves, coder=coder, folded=folded,
    )  # fmt: skip


def units(layer: PackedLayer) -> Tensor:
    """Return what each symbol stands for at scale 1, float32 `[L]`; learned levels have no such list."""
    assert layer.format is not None
    assert layer.bits is not None
    return _UNITS[layer.format](layer.bits, layer.symmetric)


def radix(layer: PackedLayer) -> Radix:
    """Return how the symbols of a layer are packed."""
    assert layer.format is not None
    assert layer.bits is not None
    return radix_of(layer.format, layer.bits, layer.symmetric)


def vector_sizes(layer: PackedLayer) -> dict[str, int]:
    """Return the vectors of a layer and how many entries each has."""
    sizes: dict[str, int] = {}
    if layer.format is not None:
        rows, channels = (1 if layer.granularity == "per_tensor" else layer.shape[0]), layer.shape[0]
        places = radix(layer).symbols
        scales = channels if layer.folded else rows
        names = _STORED[layer.format](layer.symmetric)
        levels = places // 2 if layer.symmetric else places
        sizes = {name: rows * levels if name == "levels" else scales for name in names}
        if layer.folded:
            sizes.pop("exponents", None)
            sizes |= {"scales": channels, "biases": channels}
        if layer.coder == "ans":
            sizes["frequencies"] = places
    return sizes | dict.fromkeys(_INPUT_VECTORS[layer.input_format], 1)


def store(layer: PackedLayer, quantized: Quantized) -> Stored:
    """Take a quantized weight apart, on the CPU; vectors as wide as they were."""
    assert layer.format is not None
    names = _STORED[layer.format](layer.symmetric)
    vectors = {name: _EXTRACT[name](quantized, layer.symmetric).reshape(-1).cpu() for name in names}
    return Stored(quantized.level_index.flatten().to(torch.uint8).cpu(), vectors)


def narrowed(layer: PackedLayer, stored: Stored) -> Stored:
    """Return vectors of the dtypes that the file has.

    Raises:
        UserError: a scale exponent of LBW does not fit int8 (a channel whose weights are all below 2^-128).
    """
    exponents = stored.vectors.get("exponents")
    if exponents is not None and int(exponents.min()) < -128:
        raise UserError(
            f"{layer.name}: scale exponents must be at least -128 to be stored in a byte, got "
            f"{int(exponents.min())}; set the weights of that channel to 0"
        )
    return replace(stored, vectors={name: value.to(VECTORS[name]) for name, value in stored.vectors.items()})


def fold(layer: PackedLayer, stored: Stored, factor: Tensor, bias: Tensor) -> Stored:
    """Multiply each channel of a weight by a factor: codes stay, negated where it is negative.

    Args:
        layer: the description after folding.
        stored: of the weight before, not narrowed.
        factor: float64 `[C]`.
        bias: float64 `[C]`, what the layer adds to its output from now on.

    Raises:
        UserError: a scale or bias becomes infinite.
    """
    vectors, channels = dict(stored.vectors), layer.shape[0]
    base = vectors.get("scales", torch.ones(1)).double()
    if (exponents := vectors.pop("exponents", None)) is not None:  # below float32's range, maybe
        base = pow2(exponents).double() * 2.0 ** (1 - lbw.magnitudes(layer.bits or 0))
    symbols, negative = stored.symbols, factor < 0
    if "levels" in vectors:  # learned ones are not symmetric: the scale takes the sign
        scale = base * factor
    else:
        scale = base * factor.abs()
        rows = symbols.view(channels, -1)
        symbols = torch.where(negative[:, None], radix(layer).symbols - 1 - rows, rows).flatten()
    if "zero_points" in vectors:  # code -> -1 - code
        zero = vectors["zero_points"].expand(channels)
        vectors["zero_points"] = torch.where(negative, -1 - zero, zero)
    vectors |= {"scales": scale.float(), "biases": bias.float()}
    if not all(bool(vectors[name].isfinite().all()) for name in ("scales", "biases")):
        raise UserError(
            f"{layer.name}: scales must be finite with batch norm folded into them, got infinite ones; "
            "pack without folding, or train on"
        )
    return replace(stored, symbols=symbols, vectors=vectors)


def dequantize(layer: PackedLayer, stored: Stored) -> Tensor:
    """Return the weight, float32, the layer's shape, a new tensor: bit for bit what was evaluated."""
    vectors, shape = stored.vectors, layer.shape
    if "levels" in vectors:
        table = vectors["levels"].view(1 if layer.granularity == "per_tensor" else shape[0], -1)
        table = learned_levels.mirror(table) if layer.symmetric else table
        value = table.gather(1, stored.symbols.long().view(len(table), -1)).view(shape)
        return value * _per_row(vectors["scales"], shape) if layer.folded else value
    value = torch.from_numpy(np.take(units(layer).numpy(), stored.symbols.numpy())).view(shape)
    if "zero_points" in vectors:
        value -= _per_row(vectors["zero_points"].float(), shape)
    if "exponents" in vectors:
        steps = lbw.magnitudes(layer.bits or 0) - 1
        return value.mul_(_per_row(pow2(vectors["exponents"].to(torch.int32) - steps), shape))
    return value.mul_(_per_row(vectors["scales"], shape))


def _per_row(vector: Tensor, shape: tuple[int, ...]) -> Tensor:
    return vector.view(-1, *[1] * (len(shape) - 1))


def _lbw_units(bits: int, _: bool) -> Tensor:
    return lbw.levels(bits) * (1 << (lbw.magnitudes(bits) - 1))


_UNITS: dict[str, Callable[[int, bool], Tensor]] = {
    "lbw": _lbw_units,
    "uniform": uniform.levels,
    "dorefa": lambda bits, _: dorefa.levels(bits),
    "binary": lambda bits, _: binary.levels(),
}
_STORED: dict[str, Callable[[bool], tuple[str, ...]]] = {
    "lbw": lambda _: ("exponents",),
    "uniform": lambda symmetric: ("scales",) if symmetric else ("scales", "zero_points"),
    "dorefa": lambda _: ("scales",),
    "binary": lambda _: ("scales",),
    "learned_levels": lambda _: ("levels",),
}
_EXTRACT: dict[str, Callable[[Any, bool], Tensor]] = {
    "exponents": lambda quantized, _: quantized.scale_exponent,
    "scales": lambda quantized, _: quantized.scale,
    "zero_points": lambda quantized, _: quantized.zero_point,
    "levels": lambda quantized, symmetric: quantized.table[
        :, quantized.table.shape[1] // 2 if symmetric else 0 :
    ],
}
_INPUT_VECTORS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "uniform": ("input_scales", "input_lows"),
    "dorefa": ("input_scales",),
    "binary": (),
}
