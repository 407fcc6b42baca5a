"""The straight-through estimator: other values forward, the same gradient backward."""

from __future__ import annotations

import math

import pytest
import torch

from lbdet.quant.ste import straight_through, sum_to_shape, where_at_least, where_inside


def test_the_values_are_the_quantized_ones_bit_for_bit_and_without_a_copy() -> None:
    value = torch.tensor([0.1, 1e30, -3.0], requires_grad=True)
    quantized = torch.tensor([0.0, -0.0, 2.0**-149])
    result = straight_through(value, quantized)  # value + (quantized - value) would round
    assert torch.equal(result.detach().view(torch.int32), quantized.view(torch.int32))
    assert result.data_ptr() == quantized.data_ptr()


def test_the_gradient_passes_unchanged_to_the_value_and_none_to_the_quantized() -> None:
    value = torch.tensor([0.1, 100.0, -3.0], requires_grad=True)
    quantized = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    grad = torch.tensor([1.5, -2.0, 7.0])
    straight_through(value, quantized).backward(grad)
    assert value.grad is not None
    assert torch.equal(value.grad, grad)
    assert quantized.grad is None


def test_a_loss_of_the_result_has_the_gradient_at_the_quantized_weights() -> None:
    value = torch.tensor([0.6, -0.2], requires_grad=True)
    quantized = torch.tensor([0.5, 0.0])
    straight_through(value, quantized).square().sum().backward()
    assert value.grad is not None
    assert torch.equal(value.grad, 2 * quantized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [(0.0, 3.0), (-8.0, 7.0), (-1.0, 0.0)])
def test_the_gradient_passes_between_the_ends_and_at_them_but_not_next_to_them(ends, dtype) -> None:
    low, high = (torch.tensor(end, dtype=dtype) for end in ends)
    infinity = torch.tensor(math.inf, dtype=dtype)
    inside = [low, high, low.nextafter(infinity), high.nextafter(-infinity), (low + high) / 2]
    outside = [low.nextafter(-infinity), high.nextafter(infinity), infinity, -infinity]
    x = torch.stack([*inside, *outside] * 5)  # long enough for vector instructions and the rest behind them
    grad = torch.arange(1, 46, dtype=dtype)
    expected = grad * torch.tensor(([1.0] * 5 + [0.0] * 4) * 5, dtype=dtype)
    assert torch.equal(where_inside(grad, x, *ends), expected)
    assert torch.equal(where_inside(grad, x, low.expand(45), high.expand(45)), expected)
    above = grad * (x >= low)
    assert torch.equal(where_at_least(grad, x, ends[0]), above)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sum_on_a_cpu_is_rounded_once_whatever_its_shape_and_layout(layout) -> None:
    terms = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    terms[0] *= 2**26  # in float32 the sum would lose the rest
    for shape in ((), (1,), (1, 1, 1, 1), (3, 1, 1), (2, 1, 1, 1)):
        found = sum_to_shape(terms, torch.Size(shape))
        assert found.shape == shape
        assert torch.equal(found.float(), terms.double().sum_to_size(shape).float())
