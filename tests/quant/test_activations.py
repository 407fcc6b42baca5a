"""Ranges of activations against every scale and low tried on the raw values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import hardswish

from lbdet.errors import NumericsError
from lbdet.quant import activations
from lbdet.quant.activations import (
    OBJECTIVES,
    BucketSums,
    ChannelStatistics,
    direct_range,
    error,
    fit_range,
    follow,
    sample,
)

WIDTHS = range(activations.MIN_BITS, activations.MAX_BITS + 1)
FLOAT32 = torch.finfo(torch.float32)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantiles(per_channel: int, channels: int = 6) -> Tensor:
    """A Gaussian without sampling noise, `[2, C, 16, n]`: channels of different spread, values shuffled."""
    places = torch.arange(per_channel, dtype=torch.float64) + torch.linspace(0.1, 0.9, channels)[:, None]
    order = torch.randperm(per_channel, generator=torch.Generator().manual_seed(0))
    spread = torch.logspace(-0.15, 0.15, channels, dtype=torch.float64)[:, None]
    rows = torch.special.ndtri(places / per_channel)[:, order] * spread
    return rows.float().view(channels, 2, 16, -1).transpose(0, 1).contiguous()


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.relu(),
    "gaussian": lambda x: x,
    "mostly negative": lambda x: x - 1,
    "hardswish": lambda x: hardswish(2 * x),
    "heavy tails": lambda x: x.sign() * torch.expm1(1.2 * x.abs()),
    "relu6": lambda x: (3 * x).clamp(0, 6),
}


def plain_quantize(x: Tensor, scale: float, low: int, bits: int) -> Tensor:
    return scale * (x.double() / scale).round().clamp(low, low + 2**bits - 1)


def plain_error(x: Tensor, quantized: Tensor, objective: str, dim: int) -> float:
    channels = [x.flatten()] if objective == "mse" else x.unbind(dim)
    theirs = [quantized.flatten()] if objective == "mse" else quantized.unbind(dim)
    relative: list[float] = []
    for channel, approximation in zip(channels, theirs, strict=True):
        values = channel.flatten().double().tolist()
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values)
        if variance > 0:
            errors = zip(values, approximation.flatten().double().tolist(), strict=True)
            relative.append(math.fsum((v - q) ** 2 for v, q in errors) / variance)
    return math.fsum(relative) / max(len(relative), 1)


def error_of(x: Tensor, found: tuple[float, int], bits: int, objective: str, dim: int = 1) -> float:
    return plain_error(x, plain_quantize(x, *found, bits), objective, dim)


@functools.cache
def calibration_input(name: str, bits: int) -> Tensor:
    return INPUTS[name](quantiles(512 if bits < 7 else 2048))


@functools.cache
def dense_optimum(name: str, bits: int) -> dict[str, float]:
    """The least errors over scales 1/32 octave apart, with all lows of up to 4 bits and some of more."""
    values = calibration_input(name, bits).transpose(0, 1).flatten(1).double()
    variance, variance_of_all = values.var(1, correction=0), values.var(correction=0)
    n, best = 2**bits - 1, {"mse": math.inf, "channel_aware": math.inf}
    for i in range(-32, 32 * (7 if bits < 5 else 3)):
        scale = float(values.abs().max()) / n * 2 ** (-i / 32)
        near = {round(float(values.min()) / scale * f / 8) for f in (5, 6, 7, 8)}
        lows = {-j for j in range(n + 1)} if bits < 5 else {0, -n // 2} | near
        for low in sorted(low for low in lows if -n <= low <= 0):
            squared = (scale * (values / scale).round().clamp(low, low + n) - values).square().mean(1)
            best["mse"] = min(best["mse"], float(squared.mean() / variance_of_all))
            best["channel_aware"] = min(best["channel_aware"], float((squared / variance).mean()))
    return best


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", INPUTS)
def test_no_range_of_a_dense_search_is_a_hundredth_better(name: str, bits: int, objective: str) -> None:
    x = calibration_input(name, bits)
    found = error_of(x, direct_range(x, bits, objective, 1), bits, objective)
    assert found <= 1.01 * dense_optimum(name, bits)[objective]


def calibrate(batches: list[Tensor], objective: str, dim: int = 1) -> BucketSums:
    statistics = ChannelStatistics()
    for batch in batches:
        statistics.update(batch, dim)
    sums = BucketSums(statistics.weights(objective))
    for batch in batches:
        sums.update(batch, dim)
    return sums


def assert_same_range(found: tuple[float, int], expected: tuple[float, int]) -> None:
    assert found == (pytest.approx(expected[0], rel=1e-3), expected[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_order_and_the_cut_of_batches_make_no_difference(objective: str) -> None:
    x = hardswish(gaussian(24, 6, 5, 7) * torch.linspace(0.5, 3, 6)[:, None, None] + 0.3)
    whole = calibrate([x], objective)
    shuffled = x[torch.randperm(24, generator=torch.Generator().manual_seed(1))]
    for batches in (x.split(1), x.split(7)[::-1], shuffled.split([20, 4]), x.split(2, dim=3)):
        cut = calibrate(list(batches), objective)
        torch.testing.assert_close(cut.sums, whole.sums, rtol=1e-11, atol=0)
        for bits in (1, 2, 4, 8):
            assert_same_range(fit_range(cut, bits), fit_range(whole, bits))


def test_large_batches_are_worked_off_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(9, 4, 5, 5)
    whole = calibrate([x], "channel_aware")
    monkeypatch.setattr(activations, "_CHUNK", 250)
    assert [len(part) for part in activations._parts(x, 1)] == [2, 2, 2, 2, 1]
    torch.testing.assert_close(calibrate([x], "channel_aware").sums, whole.sums, rtol=1e-11, atol=0)


def test_statistics_are_those_of_all_batches_joined() -> None:
    x = gaussian(20, 3, 4, 4) * torch.tensor([1.0, 30.0, 1e-3])[:, None, None] + 100
    statistics = ChannelStatistics()
    for batch in x.split([1, 12, 7]):
        statistics.update(batch, 1)
    values = x.double().transpose(0, 1).flatten(1)
    assert statistics.count == 320
    torch.testing.assert_close(statistics.mean, values.mean(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(statistics.variance(), values.var(1, correction=0), rtol=1e-12, atol=0)
    assert torch.equal(statistics.minimum, values.amin(1))
    assert torch.equal(statistics.maximum, values.amax(1))


def test_the_sums_of_all_buckets_are_those_of_the_elements() -> None:
    x = gaussian(5, 4, 6, 6) * torch.tensor([1.0, 0.0, 50.0, 1e-30])[:, None, None]
    for objective in OBJECTIVES:
        sums = calibrate([x], objective)
        weighted = sums.weights[:, None, None] * torch.stack([x.double() ** k for k in range(3)])
        torch.testing.assert_close(
            sums.sums.sum(2).sum(1), weighted.sum((1, 2, 3, 4)), rtol=1e-11, atol=1e-20
        )


def excess(x: Tensor, t: Tensor) -> Tensor:
    sums = calibrate([x], "mse", -1)
    return activations._excess(activations._side(sums.sums[:, 0]), t)


def test_the_excess_over_a_border_of_buckets_is_exact() -> None:
    x = gaussian(1, 3000).abs().square()
    t = torch.cat([torch.arange(1, 65) / 64 + 1, torch.arange(1, 65) / 512 + 0.125, torch.tensor([1e-9, 99])])
    expected = (x.double() - t.double()[:, None]).clamp_min(0).sum(1)
    torch.testing.assert_close(excess(x, t.double()), expected, rtol=1e-12, atol=0)


def test_within_a_bucket_the_excess_is_that_of_values_spread_evenly_about_their_mean() -> None:
    x = torch.cat([torch.linspace(1.004, 1.010, 20001), torch.tensor([1.3])])[None]
    t = torch.linspace(1.001, 1.015, 50, dtype=torch.float64)
    expected = (x.double() - t[:, None]).clamp_min(0).sum(1)
    torch.testing.assert_close(excess(x, t), expected, rtol=1e-5, atol=1e-3)


def test_weights_divide_by_variance_and_count_and_skip_channels_without_variance() -> None:
    statistics = ChannelStatistics()
    statistics.update(torch.tensor([[0.0, 0.1, 7.0], [2.0, 0.1, 9.0], [4.0, 0.1, 11.0]]), -1)
    assert statistics.weights("mse").tolist() == [1, 1, 1]
    assert statistics.weights("channel_aware").tolist() == [pytest.approx(1 / 8), 0, pytest.approx(1 / 8)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", INPUTS)
def test_zero_is_a_level_and_the_lowest_where_nothing_is_negative(
    name: str, bits: int, objective: str
) -> None:
    x = INPUTS[name](gaussian(3, 4, 8, 8))
    _, low = direct_range(x, bits, objective, 1)
    assert 1 - 2**bits <= low <= 0
    if x.min() >= 0:
        assert low == 0


def test_one_bit_clips_the_negative_values_of_hardswish_and_four_do_not() -> None:
    x = hardswish(gaussian(4, 4, 16, 16))
    assert [direct_range(x, bits, "mse", 1)[1] for bits in (1, 2)] == [0, 0]
    assert direct_range(x, 4, "mse", 1)[1] < 0


def one_loud_channel(channels: int, loudness: float) -> Tensor:
    return (
        gaussian(4, channels, 16, 16).relu()
        * torch.tensor([loudness] + [1.0] * (channels - 1))[:, None, None]
    )


@pytest.mark.parametrize("channels", [8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_loud_channel_decides_the_range_of_mse_and_not_the_channel_aware_one(
    bits: int, channels: int
) -> None:
    growth = {
        objective: direct_range(one_loud_channel(channels, 100), bits, objective, 1)[0]
        / direct_range(one_loud_channel(channels, 1), bits, objective, 1)[0]
        for objective in OBJECTIVES
    }
    assert growth["mse"] > 10
    assert 1 / 1.5 < growth["channel_aware"] < 1.5


def test_at_eight_bits_a_loud_channel_moves_the_channel_aware_range_less_than_that_of_mse() -> None:
    x = one_loud_channel(8, 100)
    assert direct_range(x, 8, "channel_aware", 1)[0] < 0.9 * direct_range(x, 8, "mse", 1)[0]


@pytest.mark.parametrize("bits", WIDTHS)
def test_channels_without_variance_do_not_count_channel_aware(bits: int) -> None:
    x = gaussian(4, 8, 12, 12)
    constants = torch.tensor([0.0, 0.1, -300.0]).view(1, 3, 1, 1).expand(4, 3, 12, 12)
    more = torch.cat([constants, x], 1)
    expected = direct_range(x, bits, "channel_aware", 1)
    assert_same_range(direct_range(more, bits, "channel_aware", 1), expected)
    quantized = plain_quantize(more, *expected, bits)
    with_constants = error(more, quantized, "channel_aware", 1)
    assert float(with_constants) == pytest.approx(
        float(error(x, quantized[:, 3:], "channel_aware", 1)), rel=1e-5
    )


@pytest.mark.parametrize("deviation", [3e-7, 1e-3])
def test_a_channel_that_eight_bits_cannot_resolve_does_not_outweigh_the_others(deviation: float) -> None:
    x = gaussian(4, 8, 12, 12)
    nearly_constant = 1 + deviation * gaussian(4, 1, 12, 12, seed=1)
    more = torch.cat([x, nearly_constant], 1)
    expected = direct_range(x, 4, "channel_aware", 1)
    assert_same_range(direct_range(more, 4, "channel_aware", 1), expected)
    assert float(error(more, plain_quantize(more, *expected, 4), "channel_aware", 1)) < 0.1


def test_without_any_variance_the_channel_aware_range_is_that_of_mse() -> None:
    pixel = torch.tensor([[[[3.0]], [[1.0]], [[0.0]]]])
    for bits in WIDTHS:
        assert direct_range(pixel, bits, "channel_aware", 1) == direct_range(pixel, bits, "mse", 1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_features_and_maps_of_channels_are_treated_alike(objective: str) -> None:
    maps = hardswish(gaussian(3, 5, 6, 7) * torch.linspace(0.5, 3, 5)[:, None, None])
    rows = maps.movedim(1, -1)
    quantized = plain_quantize(maps, 0.4, -1, 3)
    for x, q in (
        (rows, quantized.movedim(1, -1)),
        (rows.flatten(0, 2), quantized.movedim(1, -1).flatten(0, 2)),
    ):
        assert_same_range(direct_range(x, 4, objective, -1), direct_range(maps, 4, objective, 1))
        torch.testing.assert_close(error(x, q, objective, -1), error(maps, quantized, objective, 1))
        torch.testing.assert_close(
            follow(x, 0.4, -1, 6, objective, -1), follow(maps, 0.4, -1, 6, objective, 1)
        )


def test_a_vector_is_one_row_of_features() -> None:
    x = gaussian(30)
    quantized = plain_quantize(x, 0.5, -4, 3).float()
    assert direct_range(x, 4, "mse", -1) == direct_range(x[None], 4, "mse", -1)
    assert error(x, quantized, "mse", -1) == error(x[None], quantized[None], "mse", -1)
    assert follow(x, 0.05, -8, 7, "mse", -1) == follow(x[None], 0.05, -8, 7, "mse", -1) != 0
    assert error(x, quantized, "channel_aware", -1) == follow(x, 0.05, -8, 7, "channel_aware", -1) == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_empty_batches_are_ignored(objective: str) -> None:
    x, empty = gaussian(3, 4, 5, 5), torch.empty(0, 4, 5, 5)
    with_empty, without = calibrate([empty, x, empty], objective), calibrate([x], objective)
    assert torch.equal(with_empty.sums, without.sums)
    assert fit_range(calibrate([empty], objective), 4) == (1.0, 0)
    assert fit_range(calibrate([], objective), 4) == (1.0, 0)
    assert direct_range(empty, 4, objective, 1) == (1.0, 0)
    assert follow(empty, 1.0, 0, 15, objective, 1).item() == 0
    quantized = empty.clone().requires_grad_()
    error(empty, quantized, objective, 1).backward()
    assert error(empty, quantized, objective, 1).item() == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_zeros_and_negative_zeros_have_scale_one(bits: int, objective: str) -> None:
    assert direct_range(torch.tensor([[0.0, -0.0], [-0.0, 0.0]]), bits, objective, -1) == (1.0, 0)


@pytest.mark.parametrize("value", [1.0, -0.3, 3e38, -1e-40, 2.0**-126])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_single_value_becomes_a_level_of_a_scale_that_is_a_normal_float(bits: int, value: float) -> None:
    scale, low = direct_range(torch.tensor([[value]]), bits, "mse", -1)
    assert FLOAT32.tiny <= scale <= FLOAT32.max
    if abs(value) >= FLOAT32.tiny:
        found = plain_quantize(torch.tensor([[value]]), scale, low, bits)
        assert found.item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("k", [-115, -40, 17, 110])
def test_a_power_of_two_goes_over_to_the_scale(k: int, objective: str) -> None:
    x = gaussian(4, 3, 8, 8)
    for bits in (1, 4, 8):
        scale, low = direct_range(x, bits, "mse", 1)
        assert_same_range(direct_range(x * 2.0**k, bits, "mse", 1), (scale * 2.0**k, low))


def test_values_of_both_ends_of_float32_are_summed() -> None:
    x = torch.tensor([[FLOAT32.max, -FLOAT32.max, FLOAT32.tiny, 2.0**-149]])
    for bits in WIDTHS:
        scale, low = direct_range(x, bits, "mse", -1)
        assert FLOAT32.tiny <= scale <= FLOAT32.max
        assert 1 - 2**bits <= low <= 0
    nearly_equal = torch.tensor([[FLOAT32.max, FLOAT32.max * (1 - 1e-5)]])
    assert 0.9999 * FLOAT32.max < direct_range(nearly_equal, 1, "mse", -1)[0] <= FLOAT32.max


def test_a_mass_of_values_at_the_clip_of_relu6_becomes_the_highest_level() -> None:
    x = (4 * gaussian(8, 8, 16, 16)).clamp(0, 6)
    for bits in (6, 8):
        scale, low = direct_range(x, bits, "mse", 1)
        assert (scale * (2**bits - 1), low) == (pytest.approx(6, rel=5e-4), 0)


@pytest.mark.parametrize("bits", range(1, 7))
def test_values_that_are_levels_already_are_kept(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.float32) - (2**bits) // 3
    x = 0.37 * codes.repeat(1, 5)
    scale, low = direct_range(x, bits, "mse", -1)
    assert (scale, low) == (pytest.approx(0.37, rel=1e-4), codes[0])


def test_of_equally_good_scales_the_largest_is_taken() -> None:
    for value in (gaussian(20).abs() + 0.1).tolist():
        x = torch.tensor([[0.0, value]])  # no error at value / k
        assert direct_range(x, 4, "mse", -1)[0] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_in_both_passes(bad: float) -> None:
    x = gaussian(2, 3, 4, 4)
    x[1, 2, 0, 0] = bad
    with pytest.raises(NumericsError, match="an activation has values that are not finite"):
        ChannelStatistics().update(x, 1)
    with pytest.raises(NumericsError, match="an activation has values that are not finite"):
        BucketSums(torch.zeros(3, dtype=torch.float64)).update(x, 1)
    with pytest.raises(NumericsError, match="an activation has values that are not finite"):
        direct_range(x, 4, "mse", 1)
    with pytest.raises(NumericsError, match="an activation has values that are not finite"):
        direct_range(torch.tensor([[1e300]], dtype=torch.float64), 4, "mse", -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_floats_give_the_range_of_their_values(objective: str, dtype: torch.dtype) -> None:
    x = gaussian(3, 4, 8, 8).to(dtype)
    quantized = plain_quantize(x, 0.3, -7, 4)
    assert direct_range(x, 4, objective, 1) == direct_range(x.float(), 4, objective, 1)
    assert follow(x, 0.1, -7, 8, objective, 1) == follow(x.float(), 0.1, -7, 8, objective, 1)
    assert error(x, quantized.to(dtype), objective, 1).dtype == torch.float32


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_strides_make_no_difference_and_the_input_is_untouched(objective: str) -> None:
    x = hardswish(gaussian(3, 4, 8, 10))
    copy = x.clone()
    for strided in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x + 1], -1)[..., 0],
    ):
        assert_same_range(direct_range(strided, 4, objective, 1), direct_range(x, 4, objective, 1))
        assert follow(strided, 0.1, -3, 12, objective, 1) == follow(x, 0.1, -3, 12, objective, 1)
    assert torch.equal(x, copy)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_error_equals_loops_over_channels(objective: str) -> None:
    x = gaussian(3, 5, 4, 6) * torch.tensor([1.0, 0.0, 10.0, 0.1, 1.0])[:, None, None]
    x[:, 4] = 0.1
    for dim in (1, -1, 3):
        quantized = plain_quantize(x, 0.5, -3, 3).float()
        expected = plain_error(x, quantized, objective, dim)
        assert float(error(x, quantized, objective, dim)) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_of_error_is_that_of_finite_differences(objective: str) -> None:
    x, quantized = gaussian(3, 4, 2, 2), gaussian(3, 4, 2, 2, seed=1)
    quantized.requires_grad_()
    error(x, quantized, objective, 1).backward()
    assert quantized.grad is not None
    for index in [(0, 0, 0, 0), (2, 1, 0, 1), (1, 3, 1, 1)]:
        step = torch.zeros_like(x)
        step[index] = 0.1
        base = quantized.detach()
        difference = error(x, base + step, objective, 1) - error(x, base - step, objective, 1)
        assert float(quantized.grad[index]) == pytest.approx(float(difference) / 0.2, rel=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_error_moves_values_that_a_clip_holds_back_and_no_others(objective: str) -> None:
    x = gaussian(30, 2).requires_grad_()
    codes = x / 0.5
    rounded = codes + (codes.round() - codes).detach()  # straight through inside the range only
    error(x, 0.5 * rounded.clamp(-2, 2), objective, -1).backward()
    assert x.grad is not None
    clipped = codes.detach().abs() > 2.5
    assert torch.equal(x.grad.sign()[clipped], x.detach().sign()[clipped])
    assert not x.grad[codes.detach().abs() < 1.5].abs().gt(1e-7).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("factor", [1.0, 1e-20, 1e-25])
def test_error_without_variance_is_zero_and_has_a_finite_gradient(factor: float, objective: str) -> None:
    x = torch.full((4, 3), 0.7) if factor == 1 else factor * gaussian(4, 3)
    quantized = torch.ones(4, 3, requires_grad=True)
    loss = error(x, quantized, objective, -1)
    loss.backward()
    assert loss.item() == 0
    assert quantized.grad is not None
    assert not quantized.grad.any()


def settle(x: Tensor, scale: float, found: tuple[float, int], bits: int, objective: str) -> float:
    """Iterate `follow` with momentum 1/2 and return the scale in the end."""
    low = found[1]
    for _ in range(50):
        scale *= math.exp(0.5 * float(follow(x, scale, low, low + 2**bits - 1, objective, 1)))
    return scale


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("start", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["relu", "gaussian", "hardswish"])
def test_followed_again_and_again_a_scale_settles_near_the_best(
    name: str, bits: int, start: float, objective: str
) -> None:
    x = INPUTS[name](gaussian(4, 6, 24, 24) * torch.linspace(0.7, 1.4, 6)[:, None, None])
    found = direct_range(x, bits, objective, 1)
    settled = settle(x, start * found[0], found, bits, objective)
    assert settled == pytest.approx(found[0], rel=0.2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_follow_returns_the_best_of_the_five_factors(objective: str) -> None:
    x = hardswish(gaussian(3, 4, 6, 6) * torch.linspace(0.5, 2, 4)[:, None, None])
    steps = [k / 4 * math.log(2) for k in range(-2, 3)]
    seen = set()
    for scale in torch.logspace(-1, 1, 30).tolist():
        errors = [error_of(x, (scale * math.exp(step), -1), 3, objective) for step in steps]
        found = follow(x, torch.tensor(scale), torch.tensor(-1), torch.tensor(6), objective, 1)
        assert (found.shape, found.dtype) == ((), torch.float32)
        assert float(found) == pytest.approx(steps[errors.index(min(errors))], abs=1e-6)
        seen.add(round(float(found), 3))
    assert len(seen) == 5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_follow_leaves_a_scale_alone_where_the_batch_tells_nothing(objective: str) -> None:
    x = gaussian(3, 4, 6, 6)
    not_finite = x.clone()
    not_finite[0, 1, 2, 3] = math.nan
    infinite = x.clone()
    infinite[0, 1, 2, 3] = -math.inf
    for batch in (torch.zeros(2, 3, 4, 4), not_finite, infinite):
        assert follow(batch, 0.1, 0, 15, objective, 1).item() == 0
    assert follow(x * 1e-6, 1.0, 0, 15, objective, 1).item() == pytest.approx(-math.log(2) / 2)


def test_follow_has_no_gradient() -> None:
    x, scale = gaussian(3, 4, 6, 6).requires_grad_(), torch.tensor(0.1, requires_grad=True)
    assert not follow(x, scale, 0, 15, "mse", 1).requires_grad


@pytest.mark.parametrize(
    "shape", [(2, 8, 128, 128), (16, 3, 64, 64), (64, 4096), (3, 700, 9, 9), (4, 64, 323, 20)]
)
def test_a_sample_is_spread_over_all_positions_and_holds_all_channels(shape: tuple[int, ...]) -> None:
    dim = 1 if len(shape) == 4 else -1
    where = torch.meshgrid(*(torch.linspace(0, 1, size) for size in shape), indexing="ij")
    channel = sample(where[dim], dim)
    assert channel.shape[1] == shape[dim]
    assert channel.numel() <= max(1 << 14, 32 * shape[dim])
    assert torch.equal(channel, torch.linspace(0, 1, shape[dim]).expand_as(channel))
    others = [d for d in range(len(shape)) if d != dim % len(shape)]
    along = torch.stack([sample(where[d], dim)[:, 0] for d in others])
    assert along.mean(1).tolist() == pytest.approx([0.5] * len(others), abs=0.05)
    spread = [float(where[d].var(correction=0)) for d in others]
    assert along.var(1, correction=0).tolist() == pytest.approx(spread, rel=0.15)
    if len(others) > 1:
        assert (torch.corrcoef(along) - torch.eye(len(others))).abs().max() < 0.3


def test_a_small_batch_is_its_own_sample() -> None:
    x = gaussian(3, 4, 6, 6)
    assert torch.equal(sample(x, 1), x.movedim(1, -1).reshape(-1, 4))
    assert sample(torch.empty(0, 4, 6, 6), 1).shape == (0, 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_outside_the_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"activations have widths 1 to 8, got {bits}"):
        direct_range(torch.ones(1, 1), bits, "mse", -1)


def test_an_unknown_objective_is_refused() -> None:
    x = torch.ones(2, 2)
    for refused in (
        lambda: error(x, x, "l2", -1),
        lambda: direct_range(x, 4, "l2", -1),
        lambda: follow(x, 1.0, 0, 15, "l2", -1),
    ):
        with pytest.raises(ValueError, match="objective must be one of mse, channel_aware, got 'l2'"):
            refused()
