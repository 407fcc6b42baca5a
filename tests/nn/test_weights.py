"""What every weight format promises, and which promises only some of them make (the table `HOLDS`)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lbdet.errors import NumericsError
from lbdet.nn import (
    FORMATS,
    BinaryWeight,
    DorefaWeight,
    LbwWeight,
    LearnedLevelsWeight,
    Quantized,
    UniformWeight,
    WeightQuantizer,
)
from lbdet.quant import binary, dorefa, lbw, learned_levels, uniform
from lbdet.quant.rows import per_row

GRANULARITIES = ("per_tensor", "per_channel")
FORMS: dict[str, Callable[[str], WeightQuantizer]] = {
    "lbw exact": lambda granularity: LbwWeight("exact", granularity),
    "lbw semi": lambda granularity: LbwWeight("semi", granularity),
    "uniform learned": UniformWeight,
    "uniform learned affine": lambda granularity: UniformWeight(granularity, symmetric=False),
    "uniform max": lambda granularity: UniformWeight(granularity, "max"),
    "dorefa": lambda _: DorefaWeight(),
    "binary": BinaryWeight,
    "learned_levels": LearnedLevelsWeight,
    "learned_levels symmetric": lambda granularity: LearnedLevelsWeight(granularity, symmetric=True),
}
LEARNED_SCALE = ("uniform learned", "uniform learned affine")
LEARNED_LEVELS = ("learned_levels", "learned_levels symmetric")
WITH_PARAMETERS = (*LEARNED_SCALE, *LEARNED_LEVELS)


def all_but(*forms: str) -> tuple[str, ...]:
    return tuple(form for form in FORMS if form not in forms)


HOLDS = {
    "nearest": all_but("lbw semi"),  # it assigns by thresholds before its scale is known
    "zero is a level": tuple(form for form in FORMS if form.startswith(("lbw", "uniform"))),
    "odd": all_but("uniform learned affine", "learned_levels"),
    "keeps its own output": all_but("dorefa"),  # it squeezes by tanh again
    "bit for bit": all_but("dorefa", "uniform max"),  # max divides by 2^(bits-1) - 1 again
    "times a power of two": all_but("dorefa"),
    "exactly": all_but("dorefa", *LEARNED_SCALE),  # their parameter is the logarithm of the scale
    "one element kept": all_but("dorefa", "lbw exact", "lbw semi"),
    "more bits never worse": ("lbw exact",),  # the levels of others do not contain those of fewer bits
    "gradient unchanged": all_but("dorefa", *LEARNED_SCALE),
    "looks at what is not finite": all_but(*LEARNED_SCALE),  # they leave it to the loss, or a GPU would wait
}


def quantizer_of(form: str, granularity: str, weight: Tensor | None = None, bits: int = 0) -> WeightQuantizer:
    """Return a new quantizer, started where a weight is given."""
    quantizer = FORMS[form](granularity)
    if weight is not None:
        quantizer.start(weight, bits)
    return quantizer


@cache
def started(form: str, granularity: str, bits: int) -> WeightQuantizer:
    """Return a quantizer, started from `weights()`, that tests share and none changes."""
    return quantizer_of(form, granularity, weights(), bits)


def output(form: str, granularity: str, weight: Tensor, bits: int) -> Tensor:
    return quantizer_of(form, granularity, weight, bits)(weight, bits).detach()


def granularities(form: str) -> tuple[str, ...]:
    return ("per_tensor",) if form == "dorefa" else GRANULARITIES


def parametrize(forms: tuple[str, ...], width: Callable[[int], bool]) -> pytest.MarkDecorator:
    found = [
        (form, granularity, bits)
        for form in forms
        for granularity in granularities(form)
        for bits in FORMS[form](granularity).widths
        if width(bits)
    ]
    return pytest.mark.parametrize("form, granularity, bits", found)


FEW = [(form, bits) for form in FORMS for bits in (1, 2, 4) if bits in FORMS[form]("per_tensor").widths]


def cases(forms: tuple[str, ...]) -> pytest.MarkDecorator:
    return parametrize(forms, lambda _: True)


def few_cases(forms: tuple[str, ...]) -> pytest.MarkDecorator:
    """Leave widths out where each case needs a start of its own."""
    return parametrize(forms, lambda bits: bits in (1, 2, 4))


every_case, every_few = cases(tuple(FORMS)), few_cases(tuple(FORMS))


def weights(seed: int = 0) -> Tensor:
    """Channels of different size, one of zeros."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    return weight * torch.tensor([1.0, 0.0, 1e-3, 50.0, 0.1, 3.0]).view(6, 1, 1, 1)


def without_zeros() -> Tensor:
    return weights()[[0, 2, 3, 4, 5]]


def rows(weight: Tensor, granularity: str) -> Tensor:
    return weight.reshape(1, -1) if granularity == "per_tensor" else weight.reshape(len(weight), -1)


def values_of(quantized: Quantized) -> Tensor:
    """Return the representable values of each row, float64 `[R, L]`."""
    levels = quantized.levels.double()
    if isinstance(quantized, learned_levels.LevelsTensor):
        return quantized.table.double()
    if isinstance(quantized, lbw.LBWTensor):
        return levels * torch.exp2(quantized.scale_exponent.double()).reshape(-1, 1)
    assert isinstance(quantized, (uniform.UniformTensor, dorefa.DorefaTensor, binary.BinaryTensor))
    if isinstance(quantized, uniform.UniformTensor):
        levels = levels - quantized.zero_point.reshape(-1, 1)
    return levels * quantized.scale.double().reshape(-1, 1)


def codes_of(form: str, bits: int) -> set[int]:
    """Return the codes that the format may use."""
    half = 1 << (bits - 1)
    if form == "binary":
        return {-1, 1}
    if form.startswith("lbw"):
        return set(range(-(half // 2), half // 2 + 1))
    return set(range(1 - half if form in ("uniform learned", "uniform max") else -half, half))


def test_every_format_is_in_the_table() -> None:
    assert {form.split()[0] for form in FORMS} == {name for name, f in FORMATS.items() if f.weight}
    for form in FORMS:
        quantizer = FORMS[form]("per_tensor")
        weight_format = FORMATS[quantizer.format].weight
        assert type(quantizer) is weight_format
        assert quantizer.granularity == "per_tensor"


# ---------------------------------------------------------------------------------------- levels and codes


@every_case
def test_the_output_lies_in_the_levels(form: str, granularity: str, bits: int) -> None:
    quantizer = started(form, granularity, bits)
    quantized = rows(quantizer(weights(), bits), granularity).double()
    values = values_of(quantizer.quantize(weights(), bits))
    distance = (quantized.unsqueeze(-1) - values.unsqueeze(1)).abs().amin(-1)
    assert (distance <= 1e-6 * values.abs().amax(-1, keepdim=True)).all()


@cases(HOLDS["nearest"])
def test_no_level_is_nearer_than_the_chosen_one(form: str, granularity: str, bits: int) -> None:
    quantizer = started(form, granularity, bits)
    for weight in (weights(), weights(1)):  # its scale or its levels stay those of the first
        aim = weight.tanh() if form == "dorefa" else weight
        row, chosen = rows(aim, granularity).double(), rows(quantizer(weight, bits), granularity).double()
        values = values_of(quantizer.quantize(weight, bits))
        nearest = (row.unsqueeze(-1) - values.unsqueeze(1)).abs().amin(-1)
        assert ((row - chosen).abs() <= nearest + 1e-6 * values.abs().amax(-1, keepdim=True)).all()


@every_case
def test_the_codes_dequantize_to_the_fake_quantized_weights(form: str, granularity: str, bits: int) -> None:
    quantizer = started(form, granularity, bits)
    for weight in (weights(), weights(1)):
        quantized = quantizer.quantize(weight, bits)
        assert torch.equal(quantized.dequantize(), quantizer(weight, bits))
        assert quantized.dequantize().dtype == torch.float32
        assert quantized.codes.dtype == torch.int8
        assert quantized.codes.shape == weight.shape
        assert not quantized.dequantize().requires_grad


@every_case
def test_the_levels_are_sorted_and_as_many_as_there_are_codes(form: str, granularity: str, bits: int) -> None:
    quantized = started(form, granularity, bits).quantize(weights(1), bits)
    assert quantized.levels.shape[-1] == len(codes_of(form, bits))
    assert (quantized.levels.diff() >= 0).all()
    assert quantized.levels.dtype == torch.float32
    assert set(quantized.codes.unique().tolist()) <= codes_of(form, bits)


# ----------------------------------------------------------------------------------------------- symmetries


@cases(HOLDS["keeps its own output"])
def test_quantizing_again_changes_nothing(form: str, granularity: str, bits: int) -> None:
    quantizer = started(form, granularity, bits)
    once = quantizer(weights(1), bits)
    twice = quantizer(once, bits)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)
    if form not in LEARNED_LEVELS:  # two levels may be equal
        assert torch.equal(quantizer.quantize(once, bits).codes, quantizer.quantize(weights(1), bits).codes)
    if form in HOLDS["bit for bit"]:
        assert torch.equal(twice, once)


@few_cases(HOLDS["odd"])
def test_the_negative_weight_becomes_the_negative_values(form: str, granularity: str, bits: int) -> None:
    plus, minus = (output(form, granularity, weight, bits) for weight in (without_zeros(), -without_zeros()))
    assert torch.equal(plus, -minus)


@few_cases(HOLDS["times a power of two"])
@pytest.mark.parametrize("k", [-80, 100])
def test_a_weight_times_a_power_of_two_becomes_its_values_times_it(
    form: str, granularity: str, bits: int, k: int
) -> None:
    before = started(form, granularity, bits)(weights(), bits)
    after = output(form, granularity, weights() * 2.0**k, bits) * 2.0**-k
    if form in HOLDS["exactly"]:
        assert torch.equal(after, before)
    largest = rows(before, granularity).abs().amax(-1, keepdim=True)
    errors = [rows((found - weights()).abs(), granularity) for found in (before, after)]
    assert ((errors[0] - errors[1]).abs() <= 1e-5 * largest).all()  # on a border either level is right


@pytest.mark.parametrize("form, bits", [case for case in FEW if case[0] != "dorefa"])
def test_per_channel_equals_the_channels_quantized_one_by_one(form: str, bits: int) -> None:
    together = started(form, "per_channel", bits)(weights(), bits)
    alone = torch.stack([output(form, "per_tensor", channel, bits) for channel in weights()])
    if form in LEARNED_SCALE:  # the logarithm of several numbers may be rounded otherwise than that of one
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    else:
        assert torch.equal(together, alone)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", HOLDS["more bits never worse"])
def test_more_bits_are_never_worse(form: str, granularity: str) -> None:
    quantizer = quantizer_of(form, granularity)
    for seed in range(20):
        weight = weights(seed)
        errors = [(quantizer(weight, bits) - weight).double().square().sum() for bits in quantizer.widths]
        assert all(more <= less * (1 + 1e-6) for less, more in itertools.pairwise(errors))


# ---------------------------------------------------------------------------------------- tensors and corners


@every_few
def test_the_weight_stays_as_it_is(form: str, granularity: str, bits: int) -> None:
    weight = weights()
    quantizer = quantizer_of(form, granularity, weight, bits)
    quantized = quantizer(weight, bits)
    codes = quantizer.quantize(weight, bits).codes
    assert torch.equal(weight, weights())
    assert weight.data_ptr() not in (quantized.data_ptr(), codes.data_ptr())
    assert weight.data_ptr() not in [tensor.data_ptr() for tensor in quantizer.state_dict().values()]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_strides_are_kept_and_values_do_not_depend_on_the_layout(
    form: str, granularity: str, dtype: torch.dtype
) -> None:
    weight, bits = weights().to(dtype), 1 if form == "binary" else 4
    expected = output(form, granularity, weight, bits)
    channels_last = weight.to(memory_format=torch.channels_last)
    for layout in (weight, channels_last, weight.transpose(2, 3).contiguous().transpose(2, 3)):
        quantizer = quantizer_of(form, granularity, layout, bits)
        quantized = quantizer(layout, bits)
        assert quantized.dtype == dtype
        assert quantized.stride() == layout.stride()
        assert quantizer.quantize(layout, bits).codes.shape == layout.shape
        assert torch.equal(quantized, expected)
        assert all(p.dtype == torch.float32 for p in quantizer.parameters())


@few_cases(HOLDS["zero is a level"])
def test_zeros_negative_zeros_and_channels_of_them_are_zeros(form: str, granularity: str, bits: int) -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0], [1.0, -0.0, -0.5], [-0.0, -0.0, -0.0]])
    quantized = output(form, granularity, weight, bits)
    assert (quantized[weight == 0] == 0).all()
    assert quantized[1, 0] > 0


@every_few
def test_zeros_of_both_signs_are_alike_and_nothing_but_zeros_stays_zero(
    form: str, granularity: str, bits: int
) -> None:
    weight = torch.tensor([[0.0, -0.0, 0.7], [1.0, -0.0, -0.9]])
    zeros, negative_zeros = output(form, granularity, weight, bits).flatten()[[0, 1]]
    assert zeros == negative_zeros
    nothing = torch.tensor([[0.0, -0.0], [-0.0, 0.0]])
    assert torch.equal(output(form, granularity, nothing, bits), nothing)
    if granularity == "per_channel":
        assert (output(form, granularity, torch.cat([nothing, nothing + 1]), bits)[:2] == 0).all()


@every_few
def test_one_element_is_kept(form: str, granularity: str, bits: int) -> None:
    for value in (-0.3, 1.0, 1.4999, 1.5, 1e-30, 1e30):
        quantized = output(form, granularity, torch.tensor([[value]]), bits)
        if form in HOLDS["one element kept"]:
            torch.testing.assert_close(quantized, torch.tensor([[value]]), rtol=1e-5, atol=0)
        elif form == "dorefa":
            torch.testing.assert_close(quantized, torch.tensor([[value]]).tanh(), rtol=1e-6, atol=0)
        else:  # the nearest power of two
            assert abs(quantized.item() - value) <= abs(value) * (1 / 3 + 1e-6)


@every_few
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(form: str, granularity: str, bits: int, bad: float) -> None:
    good, broken = torch.tensor([[1.0, 0.5], [1.0, 2.0]]), torch.tensor([[1.0, bad], [1.0, 2.0]])
    quantizer = quantizer_of(form, granularity, good, bits)
    with pytest.raises(NumericsError, match="not finite"):
        quantizer.quantize(broken, bits)
    if form in WITH_PARAMETERS:
        with pytest.raises(NumericsError, match="not finite"):
            quantizer.start(broken, bits)
    if form in HOLDS["looks at what is not finite"]:
        with pytest.raises(NumericsError, match="not finite"):
            quantizer(broken, bits)
    elif bad != bad:
        assert torch.equal(quantizer(broken, bits).isnan(), broken.isnan())


floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(floats, min_size=1, max_size=20), st.sampled_from(sorted(FORMS)), st.sampled_from((1, 2, 4, 6))
)
def test_any_finite_weights_keep_their_order_and_where_zero_is_a_level_their_signs(
    values: list[float], form: str, bits: int
) -> None:
    weight = torch.tensor(sorted(values))[None]
    bits = max(bits, FORMS[form]("per_channel").widths[0]) if form != "binary" else 1
    quantized = output(form, "per_channel", weight, bits)
    assert quantized.isfinite().all()
    assert (quantized.diff() >= 0).all()
    if form in HOLDS["zero is a level"]:
        assert (quantized * weight.sign() >= 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_few
def test_a_weight_on_a_gpu_is_quantized_there_as_on_the_cpu(form: str, granularity: str, bits: int) -> None:
    here, there = started(form, granularity, bits), copy.deepcopy(started(form, granularity, bits)).cuda()
    quantized = there.quantize(weights().cuda(), bits)
    assert quantized.codes.is_cuda
    torch.testing.assert_close(quantized.dequantize().cpu(), here.quantize(weights(), bits).dequantize())
    assert torch.equal(there(weights().cuda(), bits), quantized.dequantize())
    there.start(weights().cuda(), bits)
    there.settle(weights().cuda(), bits)
    assert all(tensor.is_cuda for tensor in there.state_dict().values())


# -------------------------------------------------------------------------------------------------- gradients


@cases(HOLDS["gradient unchanged"])
def test_the_gradient_passes_unchanged_everywhere(form: str, granularity: str, bits: int) -> None:
    weight = weights().requires_grad_()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    copy.deepcopy(started(form, granularity, bits))(weight, bits).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)


@cases(LEARNED_SCALE)
def test_a_learned_scale_has_the_gradients_of_lsq(form: str, granularity: str, bits: int) -> None:
    """Row by row and by the paper's formulas; the scale's is divided by the scale, see `uniform.positive`."""
    quantizer = copy.deepcopy(started(form, granularity, bits))
    weight = weights(1).requires_grad_()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    quantizer(weight, bits).backward(grad)
    log_scale, stored = quantizer.get_parameter(f"log_scale_{bits}"), quantizer.quantize(weight, bits)
    low, high = min(codes_of(form, bits)), max(codes_of(form, bits))
    assert isinstance(stored, uniform.UniformTensor)
    assert weight.grad is not None
    assert log_scale.grad is not None
    found = rows(weight.grad, granularity), log_scale.grad.reshape(-1)
    every = zip(stored.scale.reshape(-1), stored.zero_point.reshape(-1), strict=True)
    for r, (scale, zero_point) in enumerate(every):
        steps, g = rows(weight, granularity)[r] / scale, rows(grad, granularity)[r]
        below, above = steps < low - zero_point, steps > high - zero_point
        slope = torch.where(
            below, low - zero_point, torch.where(above, high - zero_point, steps.round() - steps)
        )
        factor = (steps.numel() * max(high - int(zero_point), 1)) ** -0.5
        assert torch.equal(found[0][r], g * ~(below | above))
        torch.testing.assert_close(found[1][r], (slope * g).sum() * factor / scale, rtol=1e-4, atol=1e-5)


def test_the_gradient_scale_of_one_sided_rows_counts_their_levels_from_zero() -> None:
    weight = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    slopes = []
    for quantizer in (UniformWeight(symmetric=False), UniformWeight("per_tensor", symmetric=False)):
        quantizer.start(weight, 4)
        assert (quantizer.get_buffer("zero_point_4") == -8).all()  # levels 0 .. 15
        quantizer(weight, 4).sum().backward()
        log_scale = quantizer.get_parameter("log_scale_4")
        assert log_scale.grad is not None
        slopes.append(log_scale.grad)
        scale = log_scale.detach().exp()
        steps = weight / per_row(scale, 2)
        slope = torch.where(steps > 15, 15, steps.round() - steps).sum(-1 if scale.ndim else (0, 1))
        expected = slope / scale / math.sqrt(weight.numel() / scale.numel() * 15)
        torch.testing.assert_close(log_scale.grad, expected, rtol=1e-4, atol=1e-5)
    assert [slope.shape for slope in slopes] == [(2,), ()]


@every_few
def test_the_gradient_reaches_the_weight_and_the_parameters_of_this_width_only(
    form: str, granularity: str, bits: int
) -> None:
    quantizer = quantizer_of(form, granularity, without_zeros(), bits)
    other = next((b for b in quantizer.widths if b != bits), bits)
    quantizer.start(without_zeros(), other)
    weight = without_zeros().requires_grad_()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    quantizer(weight, bits).backward(grad)
    assert weight.grad is not None
    assert weight.grad.any()
    for name, parameter in quantizer.named_parameters():
        used = name.endswith(f"_{bits}")
        assert (parameter.grad is not None) == used
        assert parameter.grad is None or parameter.grad.any()
    assert bool(list(quantizer.parameters())) == (form in WITH_PARAMETERS)


# ------------------------------------------------------------------------------------ parameters and training


@every_few
def test_a_format_is_started_once_it_has_its_parameters(form: str, granularity: str, bits: int) -> None:
    quantizer = quantizer_of(form, granularity)
    assert quantizer.started(bits) == (form not in WITH_PARAMETERS)
    quantizer.start(weights(), bits)
    assert quantizer.started(bits)
    others = [b for b in quantizer.widths if b != bits]
    assert all(quantizer.started(b) == (form not in WITH_PARAMETERS) for b in others)


@few_cases(WITH_PARAMETERS)
def test_a_second_start_changes_values_in_place_and_the_optimizer_goes_on(
    form: str, granularity: str, bits: int
) -> None:
    quantizer, weight = quantizer_of(form, granularity, weights(), bits), weights(1) * 3
    parameters, held = list(quantizer.parameters()), quantizer.state_dict(keep_vars=True)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    before = {name: tensor.detach().clone() for name, tensor in held.items()}
    quantizer.start(weight, bits)
    assert all(a is b for a, b in zip(parameters, quantizer.parameters(), strict=True))
    fresh = quantizer_of(form, granularity, weight, bits).state_dict()
    for name, tensor in quantizer.state_dict(keep_vars=True).items():
        assert tensor is held[name]
        assert torch.equal(tensor, fresh[name])
    assert any(not torch.equal(before[name], fresh[name]) for name in fresh)
    quantizer(weight, bits).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, fresh[name]) for name, p in quantizer.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "form, granularity, shapes",
    [
        ("uniform learned", "per_channel", {"log_scale_4": [6], "log_scale_2": [6]}),
        ("uniform learned", "per_tensor", {"log_scale_4": [], "log_scale_2": []}),
        (
            "uniform learned affine",
            "per_channel",
            {"log_scale_4": [6], "log_scale_2": [6], "zero_point_4": [6], "zero_point_2": [6]},
        ),
        ("learned_levels", "per_tensor", {"levels_4": [1, 16], "levels_2": [1, 4]}),
        ("learned_levels", "per_channel", {"levels_4": [6, 16], "levels_2": [6, 4]}),
        ("learned_levels symmetric", "per_channel", {"levels_4": [6, 8], "levels_2": [6, 2]}),
    ],
)
def test_there_is_one_set_of_parameters_a_width_that_a_state_dict_carries(
    form: str, granularity: str, shapes: dict[str, list[int]]
) -> None:
    quantizer, loaded = quantizer_of(form, granularity, weights(), 4), quantizer_of(form, granularity)
    quantizer.start(weights(), 2)
    assert {name: list(tensor.shape) for name, tensor in quantizer.state_dict().items()} == shapes
    for bits in (4, 2):
        loaded.start(weights(1), bits)
    loaded.load_state_dict(quantizer.state_dict())
    for bits in (4, 2):
        assert torch.equal(loaded(weights(), bits), quantizer(weights(), bits))


@pytest.mark.parametrize("form", all_but(*WITH_PARAMETERS))
def test_the_other_formats_have_no_state(form: str) -> None:
    bits = 1 if form == "binary" else 4
    assert not quantizer_of(form, "per_tensor", weights(), bits).state_dict()


@every_few
def test_settling_is_in_place_and_changes_nothing_where_levels_are_not_trained(
    form: str, granularity: str, bits: int
) -> None:
    quantizer, weight = quantizer_of(form, granularity, weights(), bits), nn.Parameter(weights())
    with torch.no_grad():
        weight[0, 0, 0, 0] = 1e3  # an update that went too far
    parameters, far = list(quantizer.parameters()), weight.detach().clone()
    places = [tensor.data_ptr() for tensor in (weight, *parameters)]
    quantizer.settle(weight, bits)
    assert all(a is b for a, b in zip(parameters, quantizer.parameters(), strict=True))
    assert [tensor.data_ptr() for tensor in (weight, *parameters)] == places
    assert weight.requires_grad
    assert torch.equal(weight, far) == (form not in LEARNED_LEVELS)


@few_cases(LEARNED_LEVELS)
def test_levels_out_of_order_are_sorted_and_weights_beyond_them_fetched(
    form: str, granularity: str, bits: int
) -> None:
    weight = nn.Parameter(without_zeros())
    quantizer = quantizer_of(form, granularity, weight, bits)
    levels = quantizer.get_parameter(f"levels_{bits}")
    with torch.no_grad():
        levels.copy_(-levels if levels.shape[1] == 1 else levels.flip(1))
        weight.mul_(100)
    quantizer.settle(weight, bits)
    table = values_of(quantizer.quantize(weight, bits))
    reach = table.diff()[:, [0, -1]] / 2
    assert (levels.diff() >= 0).all()
    assert (levels >= 0).all() or form == "learned_levels"
    assert (rows(weight, granularity) >= (table[:, :1] - reach[:, :1]) * (1 + 1e-6)).all()
    assert (rows(weight, granularity) <= (table[:, -1:] + reach[:, 1:]) * (1 + 1e-6)).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form, bits", FEW)
def test_thirty_steps_lower_the_loss_of_a_regression(
    form: str, bits: int, granularity: str, optimizer: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, goal = torch.randn(256, 16, generator=generator), torch.randn(8, 16, generator=generator)
    weight = nn.Parameter(torch.randn(8, 16, generator=generator))
    quantizer = quantizer_of(form, granularity, weight, bits)
    groups: list[dict[str, Any]] = [{"params": [weight]}]
    before = copy.deepcopy(quantizer.state_dict())
    if form in WITH_PARAMETERS:  # at the rate of the weights SGD would step beyond a scale of zero
        groups.append({"params": [*quantizer.parameters()], "lr": 0.005 if optimizer == "sgd" else 0.02})
    update = torch.optim.SGD(groups, lr=0.3) if optimizer == "sgd" else torch.optim.Adam(groups, lr=0.1)
    losses = []
    for _ in range(31):
        loss = (x @ (quantizer(weight, bits) - goal).T).square().mean()
        losses.append(loss.item())
        update.zero_grad()
        loss.backward()
        update.step()
        quantizer.settle(weight, bits)
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in quantizer.named_parameters())
    values = values_of(quantizer.quantize(weight, bits))
    assert (values.diff() >= 0).all()
    if form in LEARNED_LEVELS:
        distance = (rows(weight, granularity).unsqueeze(-1) - values.unsqueeze(1)).abs()
        assert torch.equal(
            rows(quantizer.quantize(weight, bits).codes, granularity).long() + (1 << (bits - 1)),
            distance.argmin(-1),
        )


# ------------------------------------------------------------------------------------- size, copies and print


@pytest.mark.parametrize(
    "quantizer, bits, stored",
    [
        (LbwWeight(), 2, 22 * 8 + 4 * 8),  # 108 weights, 5 in 8 bits; 4 scale exponents
        (LbwWeight(), 3, 36 * 7 + 4 * 8),
        (LbwWeight(), 4, 22 * 16 + 4 * 8),
        (LbwWeight(), 5, 10 * 45 + 4 * 8),
        (LbwWeight("semi", granularity="per_tensor"), 6, 9 * 61 + 8),
        (UniformWeight(), 8, 108 * 8 + 4 * 32),
        (UniformWeight("per_tensor"), 3, 108 * 3 + 32),
        (UniformWeight("per_tensor", "max"), 3, 108 * 3 + 32),
        (UniformWeight(symmetric=False), 4, 108 * 4 + 4 * (32 + 8)),  # and zero points
        (DorefaWeight(), 4, 108 * 4 + 32),
        (BinaryWeight(), 1, 108 + 4 * 32),
        (BinaryWeight("per_tensor"), 1, 108 + 32),
        (LearnedLevelsWeight(), 2, 108 * 2 + 4 * 32),
        (LearnedLevelsWeight("per_channel"), 3, 108 * 3 + 4 * 8 * 32),
        (LearnedLevelsWeight("per_channel", symmetric=True), 3, 108 * 3 + 4 * 4 * 32),
        (LearnedLevelsWeight(symmetric=True), 1, 108 + 32),
    ],
)
def test_the_stored_bits_are_those_counted_by_hand(
    quantizer: WeightQuantizer, bits: int, stored: int
) -> None:
    assert quantizer.stored_bits(torch.ones(4, 3, 3, 3), bits) == stored


@every_few
def test_a_copy_gives_the_same_values_and_is_trained_apart(form: str, granularity: str, bits: int) -> None:
    quantizer = quantizer_of(form, granularity, weights(), bits)
    quantizer(weights(), bits)
    copied = copy.deepcopy(quantizer)
    assert torch.equal(copied(weights(), bits), quantizer(weights(), bits))
    before = quantizer(weights(), bits).detach()
    copied.start(weights(1) * 3, bits)
    assert torch.equal(quantizer(weights(), bits), before)


@pytest.mark.parametrize(
    "quantizer, text",
    [
        (LbwWeight(), "LbwWeight(solver='exact', granularity='per_channel')"),
        (LbwWeight("semi", "per_tensor"), "LbwWeight(solver='semi', granularity='per_tensor', ratio=0.75)"),
        (UniformWeight(), "UniformWeight(granularity='per_channel', scale='learned', symmetric=True)"),
        (
            UniformWeight("per_tensor", symmetric=False),
            "UniformWeight(granularity='per_tensor', scale='learned', symmetric=False)",
        ),
        (DorefaWeight(), "DorefaWeight()"),
        (BinaryWeight(), "BinaryWeight(granularity='per_channel')"),
        (LearnedLevelsWeight(), "LearnedLevelsWeight(granularity='per_tensor', symmetric=False)"),
    ],
)
def test_a_quantizer_prints_what_it_is(quantizer: WeightQuantizer, text: str) -> None:
    assert repr(quantizer) == text


def test_a_uniform_scale_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^scale must be 'learned' or 'max', got 'mean'$"):
        UniformWeight(scale="mean")
    with pytest.raises(
        ValueError, match=r"^scale 'max' is symmetric, got symmetric: false; use scale 'learned'$"
    ):
        UniformWeight(scale="max", symmetric=False)


def test_a_scale_that_ran_away_is_brought_back_to_where_weights_can_use_it() -> None:
    weight = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.0, 0.0], [3.0, 1.0, -8.0]])
    for bits, largest_code in ((2, 1), (4, 7), (8, 127)):
        quantizer = UniformWeight()
        quantizer.start(weight, bits)
        log_scale = quantizer.get_parameter(f"log_scale_{bits}")
        fitted = log_scale.detach().clone()
        quantizer.settle(weight, bits)
        assert torch.equal(log_scale, fitted)
        with torch.no_grad():
            log_scale.fill_(50.0)
        quantizer.settle(weight, bits)
        assert log_scale.exp()[[0, 2]].tolist() == pytest.approx([0.5, 8.0])
        assert (quantizer(weight, bits)[[0, 2]].abs().amax(1) > 0).all()
        with torch.no_grad():
            log_scale.fill_(-50.0)
        quantizer.settle(weight, bits)
        lowest = [value / (1024 * largest_code) for value in (0.5, 8.0)]
        assert log_scale.exp()[[0, 2]].tolist() == pytest.approx(lowest, rel=1e-4)
        assert log_scale[1] == -50.0  # a row of zeros has no say


@pytest.mark.parametrize(
    ("kind", "option", "text"),
    [
        (LbwWeight, {"solver": "exakt"}, r"^solver must be 'exact' or 'semi', got 'exakt'$"),
        (LbwWeight, {"ratio": 0.0}, r"^ratio must be positive, got 0\.0$"),
        (
            LbwWeight,
            {"granularity": "row"},
            r"^granularity must be one of per_tensor, per_channel, got 'row'$",
        ),
        (UniformWeight, {"granularity": "row"}, r"^granularity must be one of"),
        (BinaryWeight, {"granularity": "row"}, r"^granularity must be one of"),
        (LearnedLevelsWeight, {"granularity": "row"}, r"^granularity must be one of"),
    ],
)
def test_an_option_that_a_format_does_not_have_is_refused_at_once(
    kind: type, option: dict, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**option)
