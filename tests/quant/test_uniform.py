"""Uniform levels against every level tried, a dense search of the scale, LSQ's gradient written as loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import oracles
import pytest
import torch
from torch import Tensor

from lbdet.errors import NumericsError
from lbdet.quant import uniform

FORMS = [(bits, True) for bits in range(2, 9)] + [(bits, False) for bits in range(1, 9)]
every_form = pytest.mark.parametrize("bits, symmetric", FORMS)
some_forms = pytest.mark.parametrize(
    "bits, symmetric", [(2, True), (4, True), (8, True), (1, False), (2, False), (4, False), (8, False)]
)
GRANULARITIES = ("per_tensor", "per_channel")
FLOAT32_MAX = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform01(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def laplace(*shape: int) -> Tensor:
    u = uniform01(*shape) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).clamp_min(1e-7).log()


def one_outlier(n: int) -> Tensor:
    return torch.cat([gaussian(n), torch.tensor([200.0])])


ROWS: dict[str, Callable[[int], Tensor]] = {
    "gaussian": gaussian,
    "laplace": laplace,
    "uniform": lambda n: uniform01(n) - 0.5,
    "one-sided": lambda n: uniform01(n),
    "one-sided negative": lambda n: -laplace(n).abs(),
    "mostly positive": lambda n: gaussian(n) + 1.5,
    "hardswish": lambda n: torch.nn.functional.hardswish(2 * gaussian(n)),
    "one outlier": one_outlier,
}


def mixed_rows() -> Tensor:
    """Rows from subnormal to huge, one of zeros, one with a single weight: each must be solved on its own."""
    factors = torch.tensor([1.0, 0.0, 2.0**-140, 2.0**100, 1e-3, 7.0])
    rows = gaussian(6, 50) * factors[:, None]
    rows[5, 1:] = 0
    return rows


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "gaussian": lambda: gaussian(6, 8, 3, 3) * 0.02,
    "laplace": lambda: laplace(4, 300),
    "depthwise": lambda: gaussian(60, 1, 3, 3),
    "positive": lambda: uniform01(4, 100),
    "negative": lambda: -uniform01(4, 100) - 1,
    "wide range": lambda: gaussian(5, 100) * 2.0 ** (20 * gaussian(5, 100, seed=2)),
    "subnormal": lambda: gaussian(4, 60) * 2.0**-130,
    "smallest subnormal": lambda: torch.tensor([[1.0, 3.0, -2.0, 0.0]]) * SMALLEST,
    "subnormal that 127 does not divide": lambda: torch.tensor([[190.0, -100.0, 0.0]]) * SMALLEST,
    "huge": lambda: gaussian(4, 60).clamp(-2, 2) * 2.0**126,
    "float32 max": lambda: torch.tensor(
        [[FLOAT32_MAX, -FLOAT32_MAX, 1e38, 1.0], [-FLOAT32_MAX, 0.0, 1.0, 2e38]]
    ),
    "one element": lambda: torch.tensor([[-0.3]]),
    "equal": lambda: torch.full((2, 30), 0.7),
    "zeros": lambda: torch.tensor([[0.0, -0.0], [-0.0, 0.0]]),
    "mixed rows": mixed_rows,
}
every_weight = pytest.mark.parametrize("name", WEIGHTS)


def rows_of(weight: Tensor, granularity: str) -> Tensor:
    return weight.reshape(1, -1) if granularity == "per_tensor" else weight.reshape(len(weight), -1)


def fitted(weight: Tensor, bits: int, granularity: str, symmetric: bool) -> uniform.UniformTensor:
    scale, zero_point = uniform.fit(weight, bits, granularity, symmetric)
    return uniform.quantize(weight, scale, zero_point, bits, symmetric)


@functools.cache
def fit_of(name: str, bits: int, granularity: str, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The fit of one of the WEIGHTS, which several tests look at."""
    return uniform.fit(WEIGHTS[name](), bits, granularity, symmetric)


def error_at(row: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The squared error of a row `[N]` at scales of any shape, in float64."""
    s = scale.double().unsqueeze(-1)
    return ((row / s).round().clamp(low, high) * s - row).square().sum(-1)


def dense_optimum(row: Tensor, bits: int, symmetric: bool) -> float:
    """The least error over every zero point and a dense grid of scales."""
    low, high = uniform.code_range(bits, symmetric)
    row, errors = row.double(), []
    for zero_point in [0] if symmetric else range(low, high + 1):
        lowest, highest = low - zero_point, high - zero_point
        reach = max(row.max() / max(highest, 1), -row.min() / max(-lowest, 1), row.abs().max() / (high - low))
        grid = reach * torch.logspace(-6, 1, 800 if symmetric else 120, base=2, dtype=torch.float64)
        errors.append(error_at(row, grid, lowest, highest).min().item())
    return min(errors)


# ------------------------------------------------------------------------------------------------ codes


def test_the_codes_are_those_of_the_table() -> None:
    assert [uniform.code_range(b, True) for b in (2, 4, 8)] == [(-1, 1), (-7, 7), (-127, 127)]
    assert [uniform.code_range(b, False) for b in (1, 2, 4, 8)] == [(-1, 0), (-2, 1), (-8, 7), (-128, 127)]


@every_form
def test_levels_are_all_codes_in_order(bits: int, symmetric: bool) -> None:
    low, high = uniform.code_range(bits, symmetric)
    assert uniform.levels(bits, symmetric).tolist() == list(range(low, high + 1))
    assert uniform.levels(bits, symmetric).dtype == torch.float32
    assert high - low + 1 == 2**bits - symmetric
    assert fitted(gaussian(2, 9), bits, "per_tensor", symmetric).levels.tolist() == list(range(low, high + 1))


@pytest.mark.parametrize("bits, symmetric", [(1, True), (9, True), (0, False), (9, False)])
def test_a_width_outside_the_range_is_refused(bits: int, symmetric: bool) -> None:
    form = "widths 2" if symmetric else "affine widths 1"
    one = torch.ones(1)
    for refused in (
        lambda: uniform.code_range(bits, symmetric),
        lambda: uniform.levels(bits, symmetric),
        lambda: uniform.fit(one, bits, symmetric=symmetric),
        lambda: uniform.quantize(one, one, one, bits, symmetric),
    ):
        with pytest.raises(ValueError, match=f"format 'uniform' has {form} to 8, got {bits}"):
            refused()


# --------------------------------------------------------------------------------------------- quantize


@every_form
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_weight_gets_the_nearest_level_of_its_row(bits: int, symmetric: bool, granularity: str) -> None:
    weight = gaussian(5, 4, 3, 3) + 0.3
    q = fitted(weight, bits, granularity, symmetric)
    rows = rows_of(weight, granularity)
    found, codes = rows_of(q.dequantize(), granularity), rows_of(q.codes, granularity)
    scales, zeros = q.scale.reshape(-1).tolist(), q.zero_point.reshape(-1).tolist()
    for row, value, code, s, z in zip(rows, found, codes, scales, zeros, strict=True):
        values = torch.tensor([s * (c - z) for c in q.levels.tolist()], dtype=torch.float64)
        assert torch.equal(value, oracles.nearest(row, values).float())
        assert value.tolist() == torch.tensor([s * (c - z) for c in code.tolist()]).tolist()


@every_form
def test_weights_next_to_every_border_get_the_nearest_level_and_ties_the_even_one(
    bits: int, symmetric: bool
) -> None:
    low, high = uniform.code_range(bits, symmetric)
    step, zero = 0.25, 0 if symmetric else low // 2
    lowest, highest = low - zero, high - zero
    borders = [k + 0.5 for k in range(lowest - 2, highest + 2)]
    for border in borders:
        at = torch.tensor(border * step)
        below, above = (torch.nextafter(at, torch.tensor(toward)) for toward in (-math.inf, math.inf))
        expected = [math.floor(border), 2 * round(border / 2), math.ceil(border)]
        expected = [min(max(level, lowest), highest) + zero for level in expected]
        weight = torch.stack([below, at, above])[None]
        q = uniform.quantize(weight, torch.tensor(step), torch.tensor(zero), bits, symmetric)
        assert q.codes.tolist() == [expected]


@some_forms
@every_weight
def test_quantizing_again_at_the_same_scale_gives_the_same_codes(
    name: str, bits: int, symmetric: bool
) -> None:
    scale, zero_point = fit_of(name, bits, "per_channel", symmetric)
    q = uniform.quantize(WEIGHTS[name](), scale, zero_point, bits, symmetric)
    again = uniform.quantize(q.dequantize(), scale, zero_point, bits, symmetric)
    assert torch.equal(again.codes, q.codes)


def test_the_parts_have_the_promised_types_and_belong_to_nobody_else() -> None:
    weight = torch.nn.Parameter(gaussian(5, 2, 3, 3))
    for granularity, shape in (("per_tensor", ()), ("per_channel", (5,))):
        scale, zero_point = uniform.fit(weight, 4, granularity, symmetric=False)
        q = uniform.quantize(weight, scale.requires_grad_(), zero_point, 4, symmetric=False)
        assert (q.codes.dtype, q.scale.dtype, q.zero_point.dtype) == (torch.int8, torch.float32, torch.int32)
        assert q.codes.shape == weight.shape
        assert q.scale.shape == q.zero_point.shape == uniform.max_scale(weight, 4, granularity).shape == shape
        assert not any(t.requires_grad for t in (q.scale, q.codes, q.dequantize()))
        assert q.scale.data_ptr() != scale.data_ptr()
        assert q.zero_point.data_ptr() != zero_point.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_that_are_not_finite_are_refused(granularity: str, bad: float) -> None:
    weight = gaussian(3, 4)
    weight[1, 2] = bad
    for refused in (
        lambda: uniform.max_scale(weight, 4, granularity),
        lambda: uniform.fit(weight, 4, granularity),
        lambda: uniform.fit(weight, 4, granularity, symmetric=False),
        lambda: uniform.quantize(weight, torch.tensor(1.0), torch.tensor(0), 4),
    ):
        with pytest.raises(NumericsError, match="a weight has values that are not finite"):
            refused()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_scale_that_is_not_positive_and_finite_is_refused(bad: float) -> None:
    scale = torch.tensor([1.0, bad])
    with pytest.raises(NumericsError, match="a scale is not positive and finite"):
        uniform.quantize(gaussian(2, 3), scale, torch.zeros(2), 4)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="granularity must be one of per_tensor, per_channel, got 'channel'"):
        uniform.fit(gaussian(2, 3), 4, "channel")
    with pytest.raises(ValueError, match="granularity must be one of per_tensor, per_channel, got 'channel'"):
        uniform.max_scale(gaussian(2, 3), 4, "channel")


# ------------------------------------------------------------------------------------------- the scale


@pytest.mark.parametrize("bits", [2, 3, 6, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "name", [name for name in WEIGHTS if name != "float32 max"]
)  # there the top level would be infinite
def test_max_scale_is_the_least_float32_at_which_nothing_clips(
    name: str, granularity: str, bits: int
) -> None:
    weight = WEIGHTS[name]()
    largest = rows_of(weight, granularity).abs().amax(1).double()
    scale = uniform.max_scale(weight, bits, granularity).reshape(-1)
    high = uniform.code_range(bits, True)[1]
    less = scale.nextafter(torch.tensor(0.0)).double()
    assert (scale[largest == 0] == 1).all()
    assert (scale.double() * high >= largest).all()
    assert (less * high < largest)[largest > 0].all()
    assert (largest.float() / scale <= high).all()  # what the gradient takes for inside


@some_forms
@pytest.mark.parametrize("granularity", GRANULARITIES)
@every_weight
def test_no_finite_weight_becomes_infinite(name: str, granularity: str, bits: int, symmetric: bool) -> None:
    weight = WEIGHTS[name]()
    scale, zero_point = fit_of(name, bits, granularity, symmetric)
    found = [(scale, zero_point)]
    if symmetric:
        found.append((uniform.max_scale(weight, bits, granularity), torch.zeros_like(zero_point)))
    low, high = uniform.code_range(bits, symmetric)
    for s, z in found:
        assert (s > 0).all()
        assert torch.isfinite(s * (high - z)).all()
        assert torch.isfinite(s * (low - z)).all()
        assert torch.isfinite(uniform.quantize(weight, s, z, bits, symmetric).dequantize()).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_float32_keeps_its_value_but_for_a_few_units_in_the_last_place(bits: int) -> None:
    weight = torch.tensor([[FLOAT32_MAX, -FLOAT32_MAX]])
    q = uniform.quantize(weight, uniform.max_scale(weight, bits), torch.zeros(1), bits)
    torch.testing.assert_close(q.dequantize(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bits, symmetric", [(2, True), (3, True), (4, True), (8, True), *((b, False) for b in (1, 2, 3, 4, 8))]
)
@pytest.mark.parametrize("name", ROWS)
def test_fit_is_within_one_percent_of_a_dense_search(name: str, bits: int, symmetric: bool) -> None:
    row = ROWS[name](2000 if bits < 8 else 600)
    scale, zero_point = uniform.fit(row[None], bits, "per_tensor", symmetric)
    low, high = uniform.code_range(bits, symmetric)
    found = error_at(row.double(), scale, low - int(zero_point), high - int(zero_point)).item()
    assert found <= 1.01 * dense_optimum(row, bits, symmetric)


@pytest.mark.parametrize("bits, symmetric", [(2, True), (1, False), (2, False)])
def test_fit_clips_to_a_small_share_of_the_largest_weight_where_that_is_best(
    bits: int, symmetric: bool
) -> None:
    row = torch.cat([gaussian(20_000), torch.tensor([45.0])])
    scale, zero_point = uniform.fit(row[None], bits, "per_tensor", symmetric)
    low, high = uniform.code_range(bits, symmetric)
    found = error_at(row.double(), scale, low - int(zero_point), high - int(zero_point)).item()
    assert scale < 45 / 2**4
    assert found <= 1.01 * dense_optimum(row, bits, symmetric)


@some_forms
@pytest.mark.parametrize("granularity", GRANULARITIES)
@every_weight
def test_fit_is_never_worse_than_the_unclipped_range(
    name: str, granularity: str, bits: int, symmetric: bool
) -> None:
    weight = WEIGHTS[name]()
    low, high = uniform.code_range(bits, symmetric)
    scales, zeros = (t.reshape(-1) for t in fit_of(name, bits, granularity, symmetric))
    widest = uniform.max_scale(weight, max(bits, 2), granularity).reshape(-1)
    for row, s, z, top in zip(
        rows_of(weight.double(), granularity), scales, zeros.tolist(), widest, strict=True
    ):
        if symmetric:
            plain, zero = top, 0
        else:
            lower, upper = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
            plain = torch.tensor((upper - lower) / (high - low) or 1.0).clamp_min(SMALLEST).double()
            zero = min(max(low - round(lower / plain.item()), low), high)
            plain = plain.clamp_max(
                FLOAT32_MAX * (1 - 1e-6) / max(high - zero, zero - low)
            )  # levels are finite
        rounding = (1e-7 * row).square().sum().item()  # of the scale to a float32
        before = error_at(row, plain, low - zero, high - zero).item()
        assert error_at(row, s, low - z, high - z).item() <= before * (1 + 1e-5) + rounding


@some_forms
@pytest.mark.parametrize("name", ["laplace", "float32 max", "zeros", "mixed rows"])
def test_per_channel_is_per_tensor_of_each_channel(name: str, bits: int, symmetric: bool) -> None:
    weight = WEIGHTS[name]()
    each = [uniform.fit(channel[None], bits, "per_tensor", symmetric) for channel in weight]
    scale, zero_point = fit_of(name, bits, "per_channel", symmetric)
    assert torch.equal(scale, torch.stack([s for s, _ in each]))
    assert torch.equal(zero_point, torch.stack([z for _, z in each]))


@some_forms
@every_weight
def test_zero_is_always_a_level(name: str, bits: int, symmetric: bool) -> None:
    weight = WEIGHTS[name]()
    scale, zero_point = fit_of(name, bits, "per_channel", symmetric)
    low, high = uniform.code_range(bits, symmetric)
    assert ((low <= zero_point) & (zero_point <= high)).all()
    assert not (symmetric and zero_point.any())
    zeros = uniform.quantize(torch.zeros_like(weight), scale, zero_point, bits, symmetric)
    assert not zeros.dequantize().any()


@some_forms
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_row_of_zeros_has_scale_one_and_zero_point_zero(
    bits: int, symmetric: bool, granularity: str
) -> None:
    q = fitted(WEIGHTS["zeros"](), bits, granularity, symmetric)
    assert (q.scale == 1).all()
    assert not q.zero_point.any()
    assert not q.codes.any()
    assert not q.dequantize().any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_smallest_subnormal_numbers_are_kept(symmetric: bool) -> None:
    weight = WEIGHTS["smallest subnormal"]()
    assert torch.equal(fitted(weight, 4, "per_channel", symmetric).dequantize(), weight)


@every_form
def test_a_row_that_is_on_levels_already_keeps_them(bits: int, symmetric: bool) -> None:
    weight = (uniform.levels(bits, symmetric) * 0.37)[None]
    q = fitted(weight, bits, "per_tensor", symmetric)
    torch.testing.assert_close(q.dequantize(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign, levels", [(1, [0, 1]), (-1, [-1, 0])])
def test_one_bit_stands_for_zero_and_one_value_on_the_side_of_the_weights(
    sign: int, levels: list[int]
) -> None:
    weight = sign * torch.tensor([[0.0, 0.1, -0.1, 0.9, 1.0, 1.1]])
    q = fitted(weight, 1, "per_tensor", symmetric=False)
    assert (q.levels - q.zero_point).tolist() == levels
    assert q.scale.item() == pytest.approx(1, rel=1e-3)
    assert (q.codes - q.zero_point).tolist() == [[0, 0, 0, sign, sign, sign]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("block", [64, 100, 1000])
def test_the_blocks_in_which_the_error_is_summed_do_not_matter(
    block: int, granularity: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = gaussian(7, 90)
    scale, zero_point = uniform.fit(weight, 4, granularity, symmetric)
    monkeypatch.setattr(uniform, "_BLOCK", block)
    again = uniform.fit(weight, 4, granularity, symmetric)
    torch.testing.assert_close(again[0], scale, rtol=2e-3, atol=0)
    assert torch.equal(again[1], zero_point)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_type_and_strides_are_fitted_as_float32(dtype: torch.dtype) -> None:
    weight = gaussian(6, 8).to(dtype)
    before = weight.clone()
    plain = weight.float()
    for symmetric in (True, False):
        expected = fitted(plain, 4, "per_channel", symmetric)
        for same in (weight, weight.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2]):
            q = fitted(same, 4, "per_channel", symmetric)
            assert torch.equal(q.scale, expected.scale)
            assert torch.equal(q.codes, expected.codes)
            assert torch.equal(uniform.max_scale(same, 4), uniform.max_scale(plain, 4))
    assert torch.equal(weight, before)


# ------------------------------------------------------------------------------------- fake_quantize


def gradients_by_loops(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, grad: Tensor, gradient_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result and both gradients as the docstring has them, element by element."""
    y, to_x, to_scale = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    every = zip(*(t.expand_as(x).reshape(-1).tolist() for t in (x, scale, low, high, grad)), strict=True)
    for i, (v, s, lo, hi, g) in enumerate(every):
        inside = lo <= v / s <= hi
        y.view(-1)[i] = s * min(max(round(v / s), lo), hi)
        to_x.view(-1)[i] = g if inside else 0
        to_scale.view(-1)[i] = g * (round(v / s) - v / s if inside else lo if v / s < lo else hi)
    return y, to_x, gradient_scale * to_scale.sum_to_size(scale.shape)


SCALES: dict[str, Tensor] = {
    "one": torch.tensor(0.31),
    "one a channel": torch.tensor([0.2, 0.31, 0.6, 1e-3]).view(4, 1, 1, 1),
    "one a channel of the input": torch.tensor([0.2, 0.5, 0.31]).view(1, 3, 1, 1),
}
LOW, HIGH = torch.tensor([-3, -7, 0, -1]).view(4, 1, 1, 1), torch.tensor([4, 0, 7, 6]).view(4, 1, 1, 1)


@pytest.mark.parametrize("low, high", [(-3, 3), (0, 7), (-7, 0), (LOW, HIGH), (LOW, 7), (-7, HIGH)])
@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, name: str, low: int | Tensor, high: int | Tensor
) -> None:
    x = gaussian(4, 3, 5, 5).to(dtype).requires_grad_()
    scale = SCALES[name].clone().requires_grad_()
    grad = gaussian(4, 3, 5, 5, seed=1).to(dtype)
    y = uniform.fake_quantize(x, scale, low, high, gradient_scale=0.3)
    y.backward(grad)
    lo, hi = torch.as_tensor(low), torch.as_tensor(high)
    exact = gradients_by_loops(x.detach().double(), SCALES[name].double(), lo, hi, grad.double(), 0.3)
    assert y.dtype == dtype
    assert x.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(y.detach().double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), exact[1], rtol=0, atol=0)
    assert scale.grad.shape == scale.shape
    assert scale.grad.dtype == torch.float32
    torch.testing.assert_close(scale.grad.double(), exact[2], rtol=1e-5, atol=1e-5)


def test_the_ends_of_the_range_are_inside_and_the_next_numbers_are_not() -> None:
    ends = torch.tensor([-0.75, 1.75])
    beyond = torch.nextafter(ends, torch.tensor([-math.inf, math.inf]))
    x = torch.cat([ends, beyond]).requires_grad_()
    uniform.fake_quantize(x, torch.tensor(0.25), -3, 7).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", SCALES)
def test_the_scales_gradient_is_the_slope_of_the_result_with_frozen_rounding(name: str) -> None:
    x, grad = gaussian(4, 3, 5, 5).double(), gaussian(4, 3, 5, 5, seed=1).double()
    start = SCALES[name].double()
    scale = start.clone().requires_grad_()
    uniform.fake_quantize(x, scale, -3, 3).backward(grad)
    rounding = (x / start).round().clamp(-3, 3) - (x / start).clamp(-3, 3)

    def loss(s: Tensor) -> Tensor:
        return (grad * s * ((x / s).clamp(-3, 3) + rounding)).sum()

    slopes = torch.zeros_like(start)
    for i in range(start.numel()):
        step = torch.zeros_like(start)
        step.view(-1)[i] = 1e-7 * start.view(-1)[i]
        slopes.view(-1)[i] = (loss(start + step) - loss(start - step)) / (2 * step.view(-1)[i])
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, slopes, rtol=1e-5, atol=1e-5)


def test_beyond_the_range_the_result_is_the_scale_times_an_integer_so_autograd_can_check_it() -> None:
    x = torch.tensor(
        [-5.0, -4.0, 3.0, 9.0], dtype=torch.float64
    )  # all clip: the function is linear in the scale
    scale = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: uniform.fake_quantize(x, s, -3, 3), scale)


def test_a_gradient_that_is_not_needed_is_none_and_the_other_does_not_change() -> None:
    x, scale = gaussian(3, 4), torch.tensor(0.3)
    both = [t.clone().requires_grad_() for t in (x, scale)]
    uniform.fake_quantize(both[0], both[1], -3, 3).sum().backward()
    only_x, only_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    uniform.fake_quantize(only_x, scale, -3, 3).sum().backward()
    uniform.fake_quantize(x, only_scale, -3, 3).sum().backward()
    assert both[0].grad is not None
    assert both[1].grad is not None
    assert torch.equal(torch.as_tensor(only_x.grad), both[0].grad)
    assert torch.equal(torch.as_tensor(only_scale.grad), both[1].grad)
    assert x.grad is None
    assert scale.grad is None


@some_forms
@every_weight
def test_fake_quantize_is_quantize_and_dequantize(name: str, bits: int, symmetric: bool) -> None:
    weight, (low, high) = WEIGHTS[name](), uniform.code_range(bits, symmetric)
    scale, zero_point = fit_of(name, bits, "per_channel", symmetric)
    expected = uniform.quantize(weight, scale, zero_point, bits, symmetric).dequantize()
    scale, zero_point = (t.reshape(-1, *[1] * (weight.ndim - 1)) for t in (scale, zero_point))
    assert torch.equal(uniform.fake_quantize(weight, scale, low - zero_point, high - zero_point), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCALES)
def test_half_types_are_calculated_in_float32(name: str, dtype: torch.dtype) -> None:
    x = (3 * gaussian(4, 3, 5, 5)).to(dtype)
    grad = gaussian(4, 3, 5, 5, seed=1).to(dtype)
    results = []
    for t in (x, x.float()):
        leaf, scale = t.clone().requires_grad_(), SCALES[name].clone().requires_grad_()
        y = uniform.fake_quantize(leaf, scale, -100, 100, 0.5)
        y.backward(grad.to(t.dtype))
        results.append((y.detach(), leaf.grad, scale.grad))
    (y, to_x, to_scale), (y32, to_x32, to_scale32) = results
    assert y.dtype == to_x.dtype == dtype
    assert to_scale.dtype == torch.float32
    assert torch.equal(y, y32.to(dtype))
    assert torch.equal(to_x, to_x32.to(dtype))
    assert torch.equal(to_scale, to_scale32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SCALES)
def test_channels_last_stays_and_strides_do_not_change_values(name: str, dtype: torch.dtype) -> None:
    x = gaussian(4, 3, 5, 6).to(dtype)
    grad = gaussian(4, 3, 5, 6, seed=1).to(dtype)

    def run(t: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf, scale = t.detach().requires_grad_(), SCALES[name].clone().requires_grad_()
        y = uniform.fake_quantize(leaf, scale, LOW, HIGH)
        to_x, to_scale = torch.autograd.grad(y, (leaf, scale), g)
        return y.detach(), to_x, to_scale

    expected = run(x, grad)
    last = run(x.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last))
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    assert last[1].is_contiguous(memory_format=torch.channels_last)
    strided = run(
        x.repeat_interleave(2, 2)[:, :, ::2], grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    )
    for found in (last, strided):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_neither_the_input_nor_the_scale_nor_the_incoming_gradient_is_changed(dtype: torch.dtype) -> None:
    x, scale, grad = (
        gaussian(4, 3).to(dtype),
        torch.tensor([[0.3], [1.0], [0.1], [2.0]]),
        gaussian(4, 3).to(dtype),
    )
    copies = [t.clone() for t in (x, scale, grad)]
    y = uniform.fake_quantize(x.requires_grad_(), scale.requires_grad_(), -3, 3)
    y.backward(grad)
    assert y.data_ptr() != x.data_ptr()
    for before, after in zip(copies, (x, scale, grad), strict=True):
        assert torch.equal(before, after)


def test_an_expanded_gradient_and_an_expanded_input_are_taken() -> None:
    x = torch.tensor([0.4, 5.0]).requires_grad_()
    uniform.fake_quantize(x.expand(3, 2), torch.tensor(1.0), -3, 3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 0]


def test_infinite_values_clip_and_what_is_not_a_number_stays_so() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38])
    y = uniform.fake_quantize(x, torch.tensor(1e-30), -2, 3)
    assert torch.equal(y[[0, 1, 3]], torch.tensor([3e-30, -2e-30, 3e-30]))
    assert y[2].isnan()


# -------------------------------------------------------------------------------- what trains the scale


def test_the_gradient_scale_is_that_of_the_paper() -> None:
    assert uniform.lsq_gradient_scale(900, 4) == pytest.approx(1 / 60)
    assert uniform.lsq_gradient_scale(16, 0) == uniform.lsq_gradient_scale(16, 1) == 0.25
    many = uniform.lsq_gradient_scale(900_000_000, torch.tensor([4, 0, 9], dtype=torch.int32))
    assert many == pytest.approx([1 / 60_000, 1 / 30_000, 1 / 90_000])


def test_positive_is_exp_and_its_gradient_is_divided_by_the_scale() -> None:
    scales = torch.tensor([1e-4, 0.5, 1.0, 300.0])
    log_scale = scales.log().requires_grad_()
    found = uniform.positive(log_scale)
    found.backward(torch.tensor([1.0, 2.0, 3.0, -4.0]))
    torch.testing.assert_close(found.detach(), scales, rtol=1e-5, atol=0)
    assert log_scale.grad is not None
    torch.testing.assert_close(
        log_scale.grad, torch.tensor([1.0, 2.0, 3.0, -4.0]) / scales, rtol=1e-5, atol=0
    )
    assert uniform.positive(torch.tensor(-50.0)) > 0


def test_a_small_sgd_step_of_the_logarithm_moves_the_scale_as_lsqs_own_parameter() -> None:
    x = gaussian(200).double()
    for start in (0.03, 0.3, 3.0):
        scale = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        log_scale = scale.detach().log().requires_grad_()
        for parameter, s in ((scale, scale), (log_scale, uniform.positive(log_scale))):
            uniform.fake_quantize(x, s, -7, 7).square().sum().backward()
            torch.optim.SGD([parameter], lr=1e-9 * start).step()
        moved = log_scale.detach().exp() - start
        torch.testing.assert_close(moved, scale.detach() - start, rtol=1e-3, atol=0)


def test_an_adam_step_of_the_logarithm_moves_every_scale_by_the_same_share() -> None:
    start = torch.tensor([1e-5, 1e-2, 1.0, 100.0])
    log_scale = start.log().requires_grad_()
    (uniform.positive(log_scale) * torch.tensor([1.0, -3.0, 1e4, -1e-3])).sum().backward()
    torch.optim.Adam([log_scale], lr=0.01).step()
    share = log_scale.detach().exp() / start
    torch.testing.assert_close(share.log(), torch.tensor([-0.01, 0.01, -0.01, 0.01]), rtol=2e-3, atol=0)
