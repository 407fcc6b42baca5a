"""Equally spaced levels, against every level tried for every weight."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from torch import Tensor

from lbdet.errors import NumericsError
from lbdet.quant import uniform

WIDTHS = range(uniform.MIN_BITS, uniform.MAX_BITS + 1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", WIDTHS)
def test_there_are_two_to_the_bits_minus_one_levels_around_zero(bits: int) -> None:
    levels = uniform.levels(bits).tolist()
    assert len(levels) == 2**bits - 1
    assert levels == sorted(-level for level in levels)
    assert {b - a for a, b in itertools.pairwise(levels)} == {1.0}


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_weight_gets_the_nearest_level_of_its_channel(bits: int) -> None:
    weight = gaussian(5, 40)
    q = uniform.quantize(weight, bits)
    scales = weight.double().abs().amax(1) / uniform.levels(bits)[-1].double()
    for row, scale, found in zip(weight, scales, q.dequantize(), strict=True):
        expected = oracles.nearest(row, uniform.levels(bits).double() * scale)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_the_largest_weight_of_each_channel_is_kept() -> None:
    weight = gaussian(6, 3, 3, 3)
    quantized = uniform.fake_quantize(weight, 4)
    torch.testing.assert_close(quantized.flatten(1).abs().amax(1), weight.flatten(1).abs().amax(1))


def test_a_weight_half_way_between_two_levels_goes_to_the_even_code() -> None:
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert uniform.quantize(weight, 4).codes.tolist() == [[7, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_zero_weights_have_scale_one_and_codes_zero(granularity: str) -> None:
    q = uniform.quantize(torch.zeros(3, 4), 8, granularity)
    assert (q.scale == 1).all()
    assert not q.codes.any()
    assert not q.dequantize().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = gaussian(2, 3)
    weight[1, 2] = bad
    with pytest.raises(NumericsError, match="not finite"):
        uniform.fake_quantize(weight, 4)


@pytest.mark.parametrize("bits", [1, 9])
def test_a_width_outside_the_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"format 'uniform' has widths 2 to 8, got {bits}"):
        uniform.quantize(torch.ones(1, 1), bits)
