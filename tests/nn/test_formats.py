"""What every weight format promises, and which promises only some of them make (the table `HOLDS`)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lbdet.errors import NumericsError
from lbdet.nn import FORMATS, LbwWeight, UniformWeight, WeightQuantizer
from lbdet.quant import lbw, uniform

GRANULARITIES = ("per_tensor", "per_channel")
LEVELS = {"lbw": lbw.levels, "uniform": uniform.levels}
FORMS = ("lbw exact", "lbw semi", "uniform")
HOLDS = {
    "nearest": ("lbw exact", "uniform"),  # semi assigns by thresholds before its scale is known
    "more bits never worse": ("lbw exact",),  # the levels of the others do not contain those of fewer bits
    "keeps its own output bit for bit": (
        "lbw exact",
        "lbw semi",
    ),  # uniform divides max|W| by 2^(bits-1) - 1 again
}


def quantizer_of(form: str, granularity: str) -> WeightQuantizer:
    name, _, solver = form.partition(" ")
    return LbwWeight(solver, granularity) if name == "lbw" else UniformWeight(granularity)


def cases(forms: tuple[str, ...]) -> pytest.MarkDecorator:
    found = [(f, g, b) for f, g in itertools.product(forms, GRANULARITIES) for b in quantizer_of(f, g).widths]
    return pytest.mark.parametrize("form, granularity, bits", found)


every_case = cases(FORMS)


def weights(seed: int = 0) -> Tensor:
    """Channels of different size, one of zeros."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    return weight * torch.tensor([1.0, 0.0, 1e-3, 50.0, 0.1, 3.0]).view(6, 1, 1, 1)


def scale_of(quantized: lbw.LBWTensor | uniform.UniformTensor) -> Tensor:
    """Return the scale as float32, `[]` or `[C]`."""
    return torch.exp2(quantized.scale_exponent) if isinstance(quantized, lbw.LBWTensor) else quantized.scale


def levels_of(form: str, weight: Tensor, granularity: str, bits: int) -> Tensor:
    """Return the levels at the scale of each row, float64 `[R, L]`."""
    scale = scale_of(quantizer_of(form, granularity).quantize(weight, bits)).reshape(-1, 1)
    return LEVELS[form.split()[0]](bits).double() * scale.double()


def rows(weight: Tensor, granularity: str) -> Tensor:
    return weight.reshape(1, -1) if granularity == "per_tensor" else weight.reshape(len(weight), -1)


def test_every_format_is_in_the_table() -> None:
    assert {form.split()[0] for form in FORMS} == set(FORMATS) == set(LEVELS)


@every_case
def test_the_output_lies_in_the_levels(form: str, granularity: str, bits: int) -> None:
    weight = weights()
    quantized = rows(quantizer_of(form, granularity)(weight, bits), granularity).double()
    levels = levels_of(form, weight, granularity, bits)
    distance = (quantized.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    assert (distance <= 1e-7 * levels.abs().amax(-1, keepdim=True)).all()


@cases(HOLDS["nearest"])
def test_no_level_is_nearer_than_the_chosen_one(form: str, granularity: str, bits: int) -> None:
    weight = weights()
    quantized = quantizer_of(form, granularity)(weight, bits)
    levels, row = levels_of(form, weight, granularity, bits), rows(weight, granularity).double()
    nearest = (row.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)
    chosen = (row - rows(quantized, granularity)).abs()
    assert (chosen <= nearest + 1e-6 * levels.abs().amax(-1, keepdim=True)).all()


@every_case
def test_quantizing_again_changes_nothing(form: str, granularity: str, bits: int) -> None:
    quantizer = quantizer_of(form, granularity)
    once = quantizer(weights(), bits)
    twice = quantizer(once, bits)
    assert torch.equal(quantizer.quantize(once, bits).codes, quantizer.quantize(weights(), bits).codes)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)
    if form in HOLDS["keeps its own output bit for bit"]:
        assert torch.equal(twice, once)


@every_case
def test_the_codes_dequantize_to_the_fake_quantized_weights(form: str, granularity: str, bits: int) -> None:
    quantizer = quantizer_of(form, granularity)
    quantized = quantizer.quantize(weights(), bits)
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes.shape == weights().shape
    assert torch.equal(quantized.dequantize(), quantizer(weights(), bits))


@every_case
def test_the_negative_weight_has_the_negative_codes(form: str, granularity: str, bits: int) -> None:
    quantizer = quantizer_of(form, granularity)
    plus, minus = quantizer.quantize(weights(), bits), quantizer.quantize(-weights(), bits)
    assert torch.equal(plus.codes, -minus.codes)
    assert torch.equal(scale_of(plus), scale_of(minus))


@every_case
@pytest.mark.parametrize("k", [-80, -1, 7, 100])
def test_a_weight_times_a_power_of_two_has_the_same_codes_and_a_scale_times_it(
    form: str, granularity: str, bits: int, k: int
) -> None:
    quantizer = quantizer_of(form, granularity)
    before, after = quantizer.quantize(weights(), bits), quantizer.quantize(weights() * 2.0**k, bits)
    nonzero = weights().flatten(1).any(1) if granularity == "per_channel" else ...
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(scale_of(before)[nonzero] * 2.0**k, scale_of(after)[nonzero])


@every_case
def test_per_channel_equals_the_channels_quantized_one_by_one(form: str, granularity: str, bits: int) -> None:
    together = quantizer_of(form, "per_channel")(weights(), bits)
    alone = [quantizer_of(form, "per_tensor")(channel, bits) for channel in weights()]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", HOLDS["more bits never worse"])
def test_more_bits_are_never_worse(form: str, granularity: str) -> None:
    quantizer = quantizer_of(form, granularity)
    for seed in range(20):
        weight = weights(seed)
        errors = [(quantizer(weight, bits) - weight).double().square().sum() for bits in quantizer.widths]
        assert all(more <= less * (1 + 1e-6) for less, more in itertools.pairwise(errors))


@every_case
def test_the_weight_stays_as_it_is(form: str, granularity: str, bits: int) -> None:
    weight = weights()
    quantizer = quantizer_of(form, granularity)
    quantized = quantizer(weight, bits)
    codes = quantizer.quantize(weight, bits).codes
    assert torch.equal(weight, weights())
    assert weight.data_ptr() not in (quantized.data_ptr(), codes.data_ptr())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_strides_and_values_do_not_depend_on_the_layout(
    form: str, granularity: str, dtype: torch.dtype
) -> None:
    quantizer = quantizer_of(form, granularity)
    weight = weights().to(dtype)
    for layout in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(2, 3)):
        quantized = quantizer(layout, 4)
        assert quantized.dtype == dtype
        assert quantized.stride() == quantizer.quantize(layout, 4).codes.stride() == layout.stride()
    assert torch.equal(quantizer(weight.to(memory_format=torch.channels_last), 4), quantizer(weight, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_case
def test_a_weight_on_a_gpu_has_the_codes_it_has_on_the_cpu(form: str, granularity: str, bits: int) -> None:
    quantizer = quantizer_of(form, granularity)
    there = quantizer.quantize(weights().cuda(), bits)
    assert there.codes.is_cuda
    assert torch.equal(there.codes.cpu(), quantizer.quantize(weights(), bits).codes)
    assert torch.equal(quantizer(weights().cuda(), bits).cpu(), quantizer(weights(), bits))


@every_case
def test_the_gradient_passes_unchanged_everywhere(form: str, granularity: str, bits: int) -> None:
    weight = weights().requires_grad_()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    quantizer_of(form, granularity)(weight, bits).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)


@every_case
def test_negative_zero_and_channels_of_zeros_are_zeros(form: str, granularity: str, bits: int) -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0], [1.0, -0.0, -1.0], [-0.0, -0.0, -0.0]])
    quantized = quantizer_of(form, granularity)(weight, bits)
    assert torch.equal(quantized, weight)


@every_case
def test_one_element_is_kept_within_a_third(form: str, granularity: str, bits: int) -> None:
    for value in (-0.3, 1.0, 1.4999, 1.5, 1e-30, 1e30):
        quantized = quantizer_of(form, granularity)(torch.tensor([[value]]), bits).item()
        assert abs(quantized - value) <= abs(value) * (1 / 3 + 1e-6)


@every_case
def test_a_weight_that_is_not_finite_is_an_error(form: str, granularity: str, bits: int) -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericsError, match="not finite"):
            quantizer_of(form, granularity)(torch.tensor([[1.0, bad], [1.0, 2.0]]), bits)


floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(floats, min_size=1, max_size=20), st.sampled_from(FORMS), st.integers(2, 6))
def test_any_finite_weights_keep_their_signs_and_their_order(
    values: list[float], form: str, bits: int
) -> None:
    weight = torch.tensor(sorted(values))[None]
    quantized = quantizer_of(form, "per_channel")(weight, bits)
    assert quantized.isfinite().all()
    assert (quantized * weight.sign() >= 0).all()
    assert (quantized.diff() >= 0).all()


@pytest.mark.parametrize(
    "quantizer, bits, stored",
    [
        (LbwWeight(), 2, 22 * 8 + 4 * 8),  # 108 weights, 5 in 8 bits; 4 scale exponents
        (LbwWeight(), 3, 36 * 7 + 4 * 8),
        (LbwWeight(), 4, 22 * 16 + 4 * 8),
        (LbwWeight(), 5, 10 * 45 + 4 * 8),
        (LbwWeight(granularity="per_tensor"), 6, 9 * 61 + 8),
        (UniformWeight(), 8, 108 * 8 + 4 * 32),
        (UniformWeight("per_tensor"), 3, 108 * 3 + 32),
    ],
)
def test_the_stored_bits_are_those_counted_by_hand(
    quantizer: WeightQuantizer, bits: int, stored: int
) -> None:
    assert quantizer.stored_bits(torch.ones(4, 3, 3, 3), bits) == stored


def test_a_quantizer_has_no_state_and_prints_what_it_is() -> None:
    assert LbwWeight().state_dict() == UniformWeight().state_dict() == {}
    assert (
        repr(LbwWeight("semi", "per_tensor"))
        == "LbwWeight(solver='semi', granularity='per_tensor', ratio=0.75)"
    )
    assert repr(LbwWeight()) == "LbwWeight(solver='exact', granularity='per_channel')"
    assert repr(UniformWeight()) == "UniformWeight(granularity='per_channel')"
