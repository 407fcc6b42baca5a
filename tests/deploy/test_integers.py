"""A weight's int8 codes and scales are the weight that training used, or there are none and it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lbdet.deploy.integers import LARGEST, integer_weight
from lbdet.errors import UserError
from lbdet.nn import (
    BinaryWeight,
    DorefaWeight,
    LbwWeight,
    LearnedLevelsWeight,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    UniformWeight,
    WeightQuantizer,
    quantized_weight,
)  # fmt: skip
from lbdet.precision import Precision

GRANULARITIES = ("per_tensor", "per_channel")
EXACT = [
    *((lambda g=g: LbwWeight(granularity=g), bits) for g in GRANULARITIES for bits in (2, 3, 4)),
    *((lambda g=g: UniformWeight(granularity=g), bits) for g in GRANULARITIES for bits in range(2, 9)),
    *((lambda g=g: UniformWeight(granularity=g, symmetric=False), b) for g in GRANULARITIES for b in (2, 7)),
    *((lambda g=g: BinaryWeight(granularity=g), 1) for g in GRANULARITIES),
]


def weights() -> Tensor:
    """Return `[8, 3, 3, 3]`, with a channel of zeros, a tiny, a huge and a one-sided one, and both zeros."""
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[2] *= 2.0**-100
    weight[3] *= 1e4
    weight[4] = weight[4].abs() + 0.1
    weight[5, 0, 0, 0], weight[5, 0, 0, 1] = 0.0, -0.0
    weight[6, 0] = weight[6, 1]
    return weight


def layer_of(quantizer: WeightQuantizer, bits: int, linear: bool = False, weight: Tensor | None = None):
    weight = weights() if weight is None else weight
    if linear:
        dense = nn.Linear(27, 8)
        dense.weight = nn.Parameter(weight.flatten(1))
        layer: QuantLayer = QuantLinear.from_float(dense, quantizer)
    else:
        conv = nn.Conv2d(3, 8, 3)
        conv.weight = nn.Parameter(weight)
        layer = QuantConv2d.from_float(conv, quantizer)
    quantizer.start(layer.weight, bits)
    layer.precision = Precision(bits, None)
    return layer


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("quantizer, bits", EXACT)
def test_codes_times_scales_are_the_weight_bit_for_bit(quantizer, bits, linear):
    layer = layer_of(quantizer(), bits, linear)
    found = integer_weight("a", layer)
    assert found.codes.dtype == torch.int8
    assert found.scale.dtype == torch.float32
    assert found.scale.shape == (8,)
    assert bool((found.scale > 0).all())
    assert int(found.codes.int().abs().max()) <= LARGEST
    assert torch.equal(found.dequantize(), quantized_weight(layer).detach())


@pytest.mark.parametrize("bits", range(1, 8))
def test_dorefa_is_exact_up_to_the_last_bit_of_a_float32(bits):
    layer = layer_of(DorefaWeight(), bits)
    found, expected = integer_weight("a", layer).dequantize(), quantized_weight(layer).detach()
    assert len(found.unique()) == len(expected.unique())
    assert float(((found - expected) / expected).abs().max()) <= 2**-23


def test_the_codes_of_lbw_are_powers_of_two_up_to_8():
    codes = integer_weight("a", layer_of(LbwWeight(), 4)).codes
    assert set(codes.unique().tolist()) == {-8, -4, -2, -1, 0, 1, 2, 4, 8}


def test_the_codes_of_a_channel_of_zeros_are_0():
    codes = integer_weight("a", layer_of(LbwWeight(), 4)).codes
    assert not codes[1].any()


@pytest.mark.parametrize("bits, largest", [(5, 128), (6, 32768)])
def test_wide_lbw_is_refused_by_name_with_its_largest_code(bits, largest):
    with pytest.raises(UserError, match=rf"^head\.0: {bits}-bit weights of format 'lbw' .* got {largest};"):
        integer_weight("head.0", layer_of(LbwWeight(), bits))


def test_learned_levels_are_refused_by_name():
    with pytest.raises(UserError, match=r"^a: 3-bit weights of format 'learned_levels' are not equally"):
        integer_weight("a", layer_of(LearnedLevelsWeight(), 3))


def test_256_odd_codes_are_refused():
    with pytest.raises(UserError, match=r"^a: 8-bit weights of format 'dorefa' .* got 25\d;"):
        integer_weight("a", layer_of(DorefaWeight(), 8))


def test_affine_codes_beyond_127_are_refused():
    layer = layer_of(UniformWeight(symmetric=False), 8, weight=weights().abs() + 1)
    with pytest.raises(UserError, match=r"^a: 8-bit weights of format 'uniform' must have codes up to 127"):
        integer_weight("a", layer)


def test_the_layer_is_not_changed():
    layer = layer_of(LbwWeight(), 4)
    integer_weight("a", layer).codes.zero_()
    assert torch.equal(layer.weight.detach(), weights())
    assert bool(quantized_weight(layer).any())
