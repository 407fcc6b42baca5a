"""A lowered model computes with integers what the quantized model computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from deploy.toys import float_model, images, quantized
from torch import Tensor, nn

from lbdet.convert import (
    ActivationFormat,
    Override,
    WeightFormat,
    quantize_model,
    quantized_layers,
    set_precision,
)
from lbdet.deploy.integers import IntegerWeight, integer_weight
from lbdet.deploy.lower import (
    InputGrid,
    LoweredConv2d,
    LoweredLinear,
    finer,
    fold,
    input_grid,
    int8_layers,
    lower,
    lowered_layers,
)
from lbdet.errors import UserError
from lbdet.nn import quantized_input, quantized_weight
from lbdet.precision import Precision

WEIGHTS = [("lbw", 2), ("lbw", 3), ("lbw", 4), ("uniform", 2), ("uniform", 8), ("dorefa", 4), ("binary", 1)]


@pytest.mark.parametrize("name, bits", WEIGHTS)
def test_outputs_are_those_of_the_quantized_model_up_to_floats_rounding(name, bits):
    model = quantized(f"W{bits}A8", WeightFormat(name))
    with torch.no_grad():
        expected, found = model(images()), lower(model)(images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def grids(precision: str, form: ActivationFormat) -> Iterator[tuple[InputGrid, Tensor, Tensor, Tensor]]:
    """Yield the grid of each layer, inputs, what the layer makes of them, and what the lowered one does."""
    model = quantized(precision, activation=form)
    found = lowered_layers(lower(model))
    for name, layer in quantized_layers(model).items():
        grid = input_grid(name, layer)
        assert grid is not None
        with torch.no_grad():
            x = probes(grid.scale, len(layer.weight[0]))
            yield grid, x, quantized_input(layer, x), found[name].input_values(x)


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_uniform_inputs_become_the_same_values_bit_for_bit(bits):
    for grid, _, expected, found in grids(f"W4A{bits}", ActivationFormat("uniform")):
        assert 0 <= grid.zero_point <= grid.steps == (1 << bits) - 1
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("clip", [1.0, 2.5, "learned"])
def test_dorefa_inputs_become_the_same_values_but_for_ties_and_the_last_bit(bits, clip):
    for grid, x, expected, found in grids(f"W4A{bits}", ActivationFormat("dorefa", {"clip": clip})):
        assert (grid.zero_point, grid.steps) == (0, (1 << bits) - 1)
        clear = ((x / grid.scale).frac().abs() - 0.5).abs() > 1e-3
        assert bool(clear.any())
        torch.testing.assert_close(found[clear], expected[clear], rtol=1e-6, atol=0)


def probes(scale: float, channels: int) -> Tensor:
    """Return inputs far inside and far outside of a grid, levels, and numbers between two levels."""
    x = torch.linspace(-300, 300, 1201) * scale
    x = torch.cat(
        [x, torch.randn(1200, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -0.0])]
    )
    return x[: x.numel() // channels * channels].view(1, channels, -1, 1)


def test_codes_are_those_of_training_or_negated_where_gamma_is_negative():
    model = quantized("W4A8")
    gamma = model.get_parameter("4.weight").detach()
    assert bool((gamma < 0).any())
    before = integer_weight("3", quantized_layers(model)["3"])
    found = lowered_layers(lower(model))["3"]
    assert found.codes is not None
    assert found.scale is not None
    assert torch.equal(found.codes, 8 * before.codes * gamma.sign().to(torch.int8).view(-1, 1, 1, 1))
    variance = model.get_buffer("4.running_var").double() + 1e-5
    expected = before.scale.double() / 8 * gamma.double().abs() / variance.sqrt()
    torch.testing.assert_close(found.scale[1:].double(), expected[1:], rtol=1e-6, atol=0)


def test_a_channel_that_batch_norm_multiplies_by_0_has_codes_0_and_its_bias_is_beta():
    found = lowered_layers(lower(quantized("W4A8")))["3"]
    assert found.codes is not None
    assert found.scale is not None
    assert found.bias is not None
    assert not found.codes[0].any()
    assert found.scale[0] == 1 / 8
    assert found.bias[0] == quantized("W4A8").get_parameter("4.bias")[0]


def test_folding_keeps_the_value_of_every_weight():
    weight = IntegerWeight(torch.tensor([[[[3]]], [[[-5]]]], dtype=torch.int8), torch.tensor([0.5, 0.25]))
    norm = nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-2.0, 4.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
    assert norm.running_mean is not None
    norm.running_mean.copy_(torch.tensor([0.5, 0.0]))
    found, bias = fold(weight, torch.tensor([0.0, 3.0]), norm)
    root = (1 + norm.eps) ** -0.5
    torch.testing.assert_close(found.dequantize().flatten(), torch.tensor([-3.0, -5.0]) * root)
    torch.testing.assert_close(bias, torch.tensor([1 + root, -1 + 12 * root]))


@pytest.mark.parametrize(
    "largest, expected", [(1, 64), (2, 64), (7, 56), (8, 64), (64, 64), (65, 65), (127, 127)]
)
def test_codes_are_made_as_large_as_64_allows_without_changing_the_weight(largest, expected):
    weight = IntegerWeight(torch.tensor([[largest, -1], [0, 1]], dtype=torch.int8), torch.tensor([0.3, 7.0]))
    found = finer(weight)
    assert int(found.codes.max()) == expected
    assert found.codes.dtype == torch.int8
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("exponent", [-149, -130, -126, -124])
def test_scales_are_not_made_so_small_that_they_lose_digits(exponent):
    weight = IntegerWeight(
        torch.tensor([[1], [3]], dtype=torch.int8), torch.tensor([1.5 * 2.0**exponent, 1.0])
    )
    assert torch.equal(finer(weight).dequantize(), weight.dequantize())


def test_codes_of_zeros_stay_zeros():
    weight = IntegerWeight(torch.zeros(2, 1, dtype=torch.int8), torch.ones(2))
    assert torch.equal(finer(weight).dequantize(), weight.dequantize())


def test_batch_norm_behind_a_folded_convolution_is_gone():
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lower(quantized("W4A8")).modules())


def test_layers_that_are_kept_float_stay_as_they_are_with_their_batch_norm():
    model = quantized("W4A8", keep_float=("0",))
    found = lower(model)
    assert type(found[0]) is nn.Conv2d
    assert isinstance(found[1], nn.BatchNorm2d)
    assert int8_layers(found) == ["3", "5", "7"]


def test_layers_without_bits_of_their_own_get_float_weights_and_inputs():
    model = quantized("W4A8", overrides=(Override("3", Precision.parse("float")),))
    layer = lowered_layers(lower(model))["3"]
    assert layer.codes is None
    assert layer.grid is None
    assert layer.weight is not None
    assert torch.equal(layer.weight, model.get_parameter("3.weight"))


def test_layers_of_8_and_of_4_bits_stand_side_by_side():
    model = quantized("W4A8", overrides=(Override("0", Precision.parse("W8A8"), WeightFormat("uniform")),))
    found = lowered_layers(lower(model))
    assert int8_layers(lower(model)) == ["0", "3", "5", "7"]
    levels = [len(layer.codes.unique()) for layer in (found["0"], found["3"]) if layer.codes is not None]
    assert levels[0] > 9 >= levels[1]


def test_weights_alone_leave_float_inputs():
    found = lower(quantized("W4"))
    assert int8_layers(found) == []
    assert all(layer.codes is not None and layer.grid is None for layer in lowered_layers(found).values())


def test_a_linear_weight_is_stored_as_engines_multiply_it():
    model = quantized("W4A8")
    layer = lowered_layers(lower(model))["7"]
    assert isinstance(layer, LoweredLinear)
    weight = quantized_weight(quantized_layers(model)["7"])
    assert torch.equal(layer.weight_values(1), weight.t())


def test_stride_groups_and_dilation_are_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=4)).eval()
    quantize_model(model, "W4")
    x = torch.randn(2, 4, 9, 9)
    found = lower(model)
    assert isinstance(found[0], LoweredConv2d)
    torch.testing.assert_close(found(x), model(x))


def test_the_model_is_not_changed():
    model = quantized("W4A8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for layer in lowered_layers(lower(model)).values():
            assert layer.bias is not None
            layer.bias.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model[1]) is nn.BatchNorm2d


def test_weights_that_do_not_fit_int8_are_refused_by_name():
    with pytest.raises(UserError, match=r"^0: 6-bit weights of format 'lbw' must .*--float-weights"):
        lower(quantized("W6A8"))


def test_on_request_they_become_float_ones_of_the_same_values():
    model = quantized("W6A8")
    found = lowered_layers(lower(model, float_weights=True))
    for name, layer in quantized_layers(model).items():
        assert torch.equal(found[name].weight_values(1).reshape(-1).sort()[0], flat(quantized_weight(layer)))
    with torch.no_grad():
        torch.testing.assert_close(lower(model, float_weights=True)(images()), model(images()))


def flat(weight: Tensor) -> Tensor:
    return weight.detach().flatten().sort()[0]


def test_inputs_without_a_zero_are_refused_by_name():
    model = float_model()
    del model[2]
    quantize_model(model, "W4A1", activation=ActivationFormat("binary"))
    with pytest.raises(UserError, match=r"^0: inputs of format 'binary' have no zero, .* format uniform"):
        lower(model)


def test_inputs_without_a_range_are_refused_by_name():
    model = quantized("W4")
    set_precision(model, {"5": Precision(4, 8)})
    with pytest.raises(UserError, match=r"^5: activations must be calibrated"):
        lower(model)


def test_other_padding_than_zeros_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    quantize_model(model, "W4")
    with pytest.raises(UserError, match=r"^0: padding must be zeros for export, got 'reflect'"):
        lower(model)
