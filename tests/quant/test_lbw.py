"""LBW weights against brute force over all scales, the paper's rule written out, and exact fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbdet.errors import NumericsError
from lbdet.quant import lbw

WIDTHS = range(lbw.MIN_BITS, lbw.MAX_BITS + 1)
GRANULARITIES = ("per_tensor", "per_channel")
FLOAT32_MAX = torch.finfo(torch.float32).max


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform01(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def laplace(*shape: int) -> Tensor:
    u = uniform01(*shape) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).clamp_min(1e-7).log()


def student_t(*shape: int) -> Tensor:
    """Three degrees of freedom: a few weights are much larger than the rest, so the best scale clips them."""
    return gaussian(*shape) / gaussian(3, *shape, seed=1).square().mean(0).sqrt()


def mixed_rows() -> Tensor:
    """Rows from subnormal to huge, one of zeros, one with a single weight: each must be solved on its own."""
    factors = torch.tensor([1.0, 0.0, 2.0**-140, 2.0**100, 1e-3, 7.0])
    rows = gaussian(6, 50) * factors[:, None]
    rows[5, 1:] = 0
    return rows


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: gaussian(6, 8, 3, 3) * 0.02,
    "gaussian rows of 4608": lambda: gaussian(2, 512, 3, 3),
    "laplace": lambda: laplace(4, 300),
    "student t": lambda: student_t(4, 300),
    "uniform": lambda: uniform01(4, 300) - 0.5,
    "depthwise": lambda: gaussian(60, 1, 3, 3),
    "wide range": lambda: gaussian(5, 100) * 2.0 ** (20 * gaussian(5, 100, seed=2)),
    "subnormal": lambda: gaussian(4, 60) * 2.0**-130,
    "smallest subnormal": lambda: torch.tensor([[1.0, 3.0, -2.0, 0.0]]) * 2.0**-149,
    "huge": lambda: gaussian(4, 60).clamp(-2, 2) * 2.0**126,
    "float32 max": lambda: torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX, 1e38, 1.0]]),
    "one element": lambda: torch.tensor([[-0.3]]),
    "equal": lambda: torch.full((2, 30), 0.7),
    "one outlier": lambda: torch.cat([torch.tensor([[1000.0]]), gaussian(1, 400)], 1),
    "mixed rows": mixed_rows,
}


def rows_of(weight: Tensor, granularity: str) -> Tensor:
    return weight.reshape(1, -1) if granularity == "per_tensor" else weight.reshape(len(weight), -1)


def assert_no_scale_is_better(weight: Tensor, q: lbw.LBWTensor, granularity: str) -> None:
    rows, found = rows_of(weight, granularity), rows_of(q.dequantize(), granularity)
    for row, quantized, s in zip(rows, found, q.scale_exponent.flatten().tolist(), strict=True):
        if not row.any():
            assert s == 0
            assert not quantized.any()
            continue
        errors = oracles.lbw_errors(row, q.bits)
        assert errors[s] == pytest.approx(min(errors.values()), rel=1e-12, abs=0)
        assert torch.equal(quantized.double(), oracles.nearest(row, oracles.lbw_levels(q.bits) * 2.0**s))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_exact_equals_brute_force_over_all_scales(name: str, granularity: str, bits: int) -> None:
    weight = WEIGHTS[name]()
    assert_no_scale_is_better(weight, lbw.quantize(weight, bits, granularity=granularity), granularity)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-96, 96), min_size=1, max_size=8).filter(any),
    st.integers(-149, 110),
    st.sampled_from(list(WIDTHS)),
)
def test_exact_finds_the_codes_of_exact_arithmetic_ties_included(
    integers: list[int], k: int, bits: int
) -> None:
    weights = [Fraction(2) ** k * i for i in integers]
    q = lbw.quantize(torch.tensor([[float(w) for w in weights]]), bits)
    s, codes = oracles.lbw_exact_by_fractions(weights, bits)
    assert (q.scale_exponent.item(), q.codes.flatten().tolist()) == (s, codes)


def test_of_two_equally_good_scales_the_larger_is_taken() -> None:
    tie = torch.tensor([[4.0, 2.0, 2.0, 2.0, 2.0]])  # 2 bits: 4, 4, 4, 4, 4 and 2, 2, 2, 2, 2
    tie = torch.cat([tie, torch.tensor([[4.0, 2.0, 0.0, 0.0, 0.0]])])
    errors = oracles.lbw_errors(tie[1], 2)
    assert errors[2] == errors[1] == 4
    assert lbw.quantize(tie, 2).scale_exponent.tolist() == [1, 2]


def borders(bits: int, s: int) -> list[float]:
    """Where the nearest level changes: 2^(s-n) for zero, 1.5 * 2^k between levels; and the clipping limit."""
    n = 2 ** (bits - 2)
    return [2.0 ** (s - n), *(1.5 * 2.0**k for k in range(s - n + 1, s)), 2.0**s]


@pytest.mark.parametrize("s", [-110, -3, 0, 5, 120])
@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_next_to_every_border_get_the_nearest_level(bits: int, s: int) -> None:
    border = torch.tensor(borders(bits, s))
    toward = torch.tensor([0.0, math.inf])[:, None]
    around = torch.cat([border, *torch.nextafter(border, toward)])
    anchors = (lbw.levels(bits) * 2.0**s).repeat(200)  # so many weights on levels that s cannot move
    weight = torch.cat([around, -around, anchors])[None]
    q = lbw.quantize(weight, bits)
    assert q.scale_exponent.tolist() == [s]
    expected = oracles.nearest(weight, oracles.lbw_levels(bits) * 2.0**s)
    assert torch.equal(q.dequantize().double(), expected)


def test_weights_that_round_to_no_float32_clip_to_the_largest_power() -> None:
    weight = torch.tensor([[FLOAT32_MAX, -1.6 * 2.0**127, 1.0]])
    for solver in ("exact", "semi"):
        assert lbw.fake_quantize(weight, 4, solver)[0, :2].tolist() == [2.0**127, -(2.0**127)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("ratio", [0.4, 0.75, 0.9, 1.5])
@pytest.mark.parametrize("name", WEIGHTS)
def test_semi_matches_its_written_rule(name: str, ratio: float, bits: int) -> None:
    weight = WEIGHTS[name]()[:8]
    q = lbw.quantize(weight, bits, "semi", "per_channel", ratio)
    for row, found in zip(
        rows_of(weight, "per_channel"), rows_of(q.dequantize(), "per_channel"), strict=True
    ):
        expected = torch.tensor(oracles.lbw_semi(row.tolist(), bits, ratio), dtype=torch.float64)
        assert torch.equal(found.double(), expected)


def semi_borders(bits: int, mu: float) -> list[float]:
    n = 2 ** (bits - 2)
    return [2.0 ** (2 - n) * mu / 3, *(2.0**-t * mu for t in range(n - 1))]


@pytest.mark.parametrize("bits", WIDTHS)
def test_semi_matches_its_rule_next_to_every_border(bits: int) -> None:
    border = torch.tensor(semi_borders(bits, 0.75 * 3))  # mu = 9/4 and every border are float32 numbers
    around = torch.cat([border, *torch.nextafter(border, torch.tensor([0.0, math.inf])[:, None])])
    weight = torch.cat([around, torch.tensor([3.0])])[None]
    expected = torch.tensor(oracles.lbw_semi(weight[0].tolist(), bits, 0.75))
    assert torch.equal(lbw.quantize(weight, bits, "semi").dequantize()[0], expected)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_exact_is_never_worse_than_semi_at_any_ratio(name: str, granularity: str, bits: int) -> None:
    weight = WEIGHTS[name]()
    exact = lbw.fake_quantize(weight, bits, "exact", granularity)
    for ratio in (0.5, 0.75, 1.0):
        semi = lbw.fake_quantize(weight, bits, "semi", granularity, ratio)
        rows = zip(*(rows_of(w, granularity) for w in (weight, exact, semi)), strict=True)
        for w, e, m in rows:
            assert oracles.squared_error(w, e) <= oracles.squared_error(w, m) * (1 + 1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
def test_two_bits_have_the_error_of_the_papers_sort_formula(name: str) -> None:
    weight = WEIGHTS[name]()
    ours = oracles.squared_error(weight, lbw.fake_quantize(weight, 2, granularity="per_tensor"))
    sorting = oracles.squared_error(weight, oracles.lbw_ternary_by_sorting(weight))
    assert ours == pytest.approx(sorting, rel=1e-12, abs=0)


@pytest.mark.parametrize("bits, error", [(2, 0.2098), (3, 0.0949), (4, 0.0414), (5, 0.0382), (6, 0.0382)])
def test_the_relative_error_on_gaussian_weights_is_that_of_the_table_in_the_docs(
    bits: int, error: float
) -> None:
    weight = gaussian(1, 500_000).double()
    alignments = [(weight * 2 ** (k / 9)).float() for k in range(9)]
    errors = [
        oracles.squared_error(w, lbw.fake_quantize(w, bits)) / w.double().square().sum() for w in alignments
    ]
    assert sum(errors) / 9 == pytest.approx(error, rel=0.003)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_the_powers_of_two_of_the_table(bits: int) -> None:
    assert lbw.levels(bits).double().tolist() == oracles.lbw_levels(bits).tolist()
    assert len(lbw.levels(bits)) == [3, 5, 9, 17, 33][bits - 2]


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_packed_symbols_fit_their_bits_and_no_smaller_group_would_do(bits: int) -> None:
    codes, group_bits = lbw.RADIX_PACKING[bits]
    symbols = len(lbw.levels(bits)) ** codes
    assert 2 ** (group_bits - 1) < symbols <= 2**group_bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_code_k_plus_one_stands_for_the_level_k_below_the_top(bits: int) -> None:
    n = 2 ** (bits - 2)
    codes = torch.arange(-n, n + 1, dtype=torch.int8)[None]
    q = lbw.LBWTensor(codes, torch.tensor([3], dtype=torch.int32), bits)
    expected = [math.copysign(2.0 ** (3 - (abs(c) - 1)), c) if c else 0.0 for c in codes[0].tolist()]
    assert q.dequantize()[0].tolist() == expected
    assert torch.equal(lbw.quantize(q.dequantize().repeat(1, 50), bits).codes[:, : 2 * n + 1], codes)


def test_the_scale_exponent_is_one_number_a_tensor_or_one_a_channel() -> None:
    weight = gaussian(5, 2, 3, 3)
    one, many = (lbw.quantize(weight, 4, granularity=g).scale_exponent for g in GRANULARITIES)
    assert (one.shape, many.shape) == ((), (5,))
    assert one.dtype == many.dtype == torch.int32


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("solver", ["exact", "semi"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_weight_of_zeros_and_negative_zeros_becomes_zeros(bits: int, solver: str, granularity: str) -> None:
    q = lbw.quantize(torch.tensor([[0.0, -0.0], [-0.0, 0.0]]), bits, solver, granularity)
    assert not q.codes.any()
    assert not q.scale_exponent.any()
    assert not q.dequantize().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", ["exact", "semi"])
def test_weights_that_are_not_finite_are_refused(solver: str, bad: float) -> None:
    weight = gaussian(3, 4)
    weight[1, 2] = bad
    for quantize in (lbw.quantize, lbw.fake_quantize):
        with pytest.raises(NumericsError, match="a weight has values that are not finite"):
            quantize(weight, 4, solver)


@pytest.mark.parametrize("bits", [1, 7])
def test_a_width_outside_the_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"format 'lbw' has widths 2 to 6, got {bits}"):
        lbw.quantize(torch.ones(1, 1), bits)


def test_an_unknown_solver_and_a_ratio_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="solver must be 'exact' or 'semi', got 'sort'"):
        lbw.quantize(torch.ones(1, 1), 4, "sort")
    with pytest.raises(ValueError, match="ratio must be positive, got 0"):
        lbw.quantize(torch.ones(1, 1), 4, "semi", ratio=0.0)
