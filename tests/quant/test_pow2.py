"""Powers of two on the bits of a float32, against Python's exact floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbdet.quant.pow2 import exponent, nearest_pow2, pow2

SMALLEST_NORMAL = 2.0**-126
normal = st.floats(SMALLEST_NORMAL, 1.5 * 2.0**127, exclude_max=True, width=32)
check = settings(max_examples=300, deadline=None, derandomize=True)


def two_around(x: float) -> tuple[float, float]:
    low = 2.0 ** (math.frexp(x)[1] - 1)
    return low, 2 * low


@check
@given(normal)
def test_the_nearest_power_is_at_least_as_near_as_its_neighbours_and_ties_go_up(x: float) -> None:
    low, high = two_around(x)
    expected = low if x - low < high - x else high
    assert nearest_pow2(torch.tensor([x])).item() == expected


@pytest.mark.parametrize("k", [-126, -100, -1, 0, 1, 60, 126])
def test_the_border_is_at_one_and_a_half_and_not_at_the_square_root_of_two(k: int) -> None:
    border = torch.tensor([1.5 * 2.0**k])
    assert nearest_pow2(border).item() == 2.0 ** (k + 1)
    assert nearest_pow2(torch.nextafter(border, torch.tensor(0.0))).item() == 2.0**k
    assert nearest_pow2(torch.nextafter(border, torch.tensor(math.inf))).item() == 2.0 ** (k + 1)


def test_zero_stays_zero_and_subnormal_numbers_become_zero_or_the_smallest_normal_one() -> None:
    subnormal = torch.tensor([0.0, 2.0**-149, 0.49 * 2.0**-126, 0.75 * 2.0**-126])
    assert nearest_pow2(subnormal).tolist() == [0.0, 0.0, 0.0, SMALLEST_NORMAL]


def test_the_argument_stays_as_it_is_and_keeps_its_strides() -> None:
    x = torch.rand(4, 6).t()
    before = x.clone()
    result = nearest_pow2(x)
    assert torch.equal(x, before)
    assert result.stride() == x.stride()
    assert result.data_ptr() != x.data_ptr()


@check
@given(normal)
def test_the_exponent_is_the_floor_of_the_logarithm(x: float) -> None:
    assert exponent(torch.tensor([x])).item() == math.frexp(x)[1] - 1


def test_the_exponent_is_right_next_to_every_power_where_a_logarithm_errs() -> None:
    powers = pow2(torch.arange(-125, 128, dtype=torch.int32))
    below = torch.nextafter(powers, torch.zeros(()))
    assert exponent(powers).tolist() == list(range(-125, 128))
    assert exponent(below).tolist() == list(range(-126, 127))
    assert exponent(torch.zeros(1)).item() == -127


def by_python(k: int) -> float:
    return math.inf if k > 127 else 2.0**k if k >= -149 else 0.0


def test_powers_are_exact_over_the_whole_range_with_zero_below_and_inf_above() -> None:
    exponents: Tensor = torch.arange(-252, 255, dtype=torch.int32)
    assert pow2(exponents).dtype == torch.float32
    assert pow2(exponents).tolist() == [by_python(k) for k in exponents.tolist()]
