"""Quantized layers: the original's twins at full precision, its quantized weight below."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.nn import LbwWeight, QuantConv2d, QuantLinear, UniformWeight, quantized_weight
from lbdet.precision import Precision
from lbdet.quant import lbw

CONVS = {
    "plain": {},
    "no bias": {"bias": False},
    "stride and padding": {"stride": 2, "padding": 1},
    "same padding": {"padding": "same"},
    "rectangular": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "dilated": {"dilation": 2, "padding": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "double": {"dtype": torch.float64},
}


def conv(case: str) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3} | CONVS[case]))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 9, 11, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_at_full_precision_equals_the_original_bit_for_bit(case: str) -> None:
    original = conv(case)
    twin = QuantConv2d.from_float(original, LbwWeight())
    x = images(original.weight.dtype)
    assert torch.equal(twin(x), original(x))


@pytest.mark.parametrize("case", CONVS)
def test_a_quantized_convolution_is_the_original_with_quantized_weights(case: str) -> None:
    original = conv(case)
    twin = QuantConv2d.from_float(original, LbwWeight())
    twin.precision = Precision(3)
    rounded = copy.deepcopy(original)
    rounded.weight.data = lbw.quantize(original.weight, 3).dequantize().to(original.weight.dtype)
    x = images(original.weight.dtype)
    assert torch.equal(twin(x), rounded(x))
    assert not torch.equal(twin(x), original(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_follows_the_same_rules(bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.Linear(5, 3, bias=bias)
    twin = QuantLinear.from_float(original, UniformWeight())
    x = torch.randn(7, 5)
    assert torch.equal(twin(x), original(x))
    twin.precision = Precision(4)
    assert torch.equal(twin(x), F.linear(x, UniformWeight()(original.weight, 4), original.bias))


@pytest.mark.parametrize("original", [nn.Conv2d(2, 3, 3), nn.Linear(2, 3), nn.Conv2d(2, 3, 1, bias=False)])
def test_parameters_are_shared_and_the_state_dict_keeps_its_keys(original: nn.Conv2d | nn.Linear) -> None:
    kind = QuantConv2d if isinstance(original, nn.Conv2d) else QuantLinear
    twin = kind.from_float(original, LbwWeight())
    assert twin.weight is original.weight
    assert twin.bias is original.bias
    assert list(twin.state_dict()) == list(original.state_dict())


def test_a_frozen_weight_stays_frozen_and_a_mode_stays_the_mode() -> None:
    original = nn.Conv2d(2, 3, 3).eval()
    original.weight.requires_grad_(False)
    twin = QuantConv2d.from_float(original, LbwWeight())
    assert not twin.training
    assert not twin.weight_quantizer.training
    assert not twin.weight.requires_grad
    assert twin.bias is not None
    assert twin.bias.requires_grad
    assert QuantConv2d.from_float(original.train(), LbwWeight()).training


def test_a_new_twin_is_float_and_scheduled() -> None:
    twin = QuantLinear.from_float(nn.Linear(2, 2), LbwWeight())
    assert twin.precision == Precision()
    assert twin.scheduled
    assert quantized_weight(twin) is twin.weight


def test_the_printed_layer_shows_its_geometry_and_its_precision() -> None:
    twin = QuantConv2d.from_float(nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), LbwWeight())
    twin.precision = Precision(4)
    assert "4, 6, kernel_size=(3, 3), stride=(2, 2), groups=2, bias=False, precision=W4" in repr(twin)
    linear = QuantLinear.from_float(nn.Linear(4, 6), UniformWeight())
    assert "in_features=4, out_features=6, bias=True, precision=float" in repr(linear)


def test_training_moves_the_float_weight_by_the_gradient_at_the_quantized_one() -> None:
    original = conv("plain")
    twin = QuantConv2d.from_float(copy.deepcopy(original), LbwWeight())
    twin.precision = Precision(2)
    rounded = copy.deepcopy(original)
    rounded.weight.data = lbw.quantize(original.weight, 2).dequantize()
    twin(images()).square().sum().backward()
    rounded(images()).square().sum().backward()
    assert torch.equal(twin.weight, original.weight)
    assert twin.weight.grad is not None
    assert torch.equal(twin.weight.grad, rounded.weight.grad)


def test_a_copy_has_its_own_weight_and_the_same_precision() -> None:
    twin = QuantConv2d.from_float(conv("plain"), LbwWeight("semi", "per_tensor"))
    twin.precision = Precision(4)
    copied = copy.deepcopy(twin)
    assert copied.precision == twin.precision
    assert torch.equal(copied(images()), twin(images()))
    assert copied.weight is not twin.weight
