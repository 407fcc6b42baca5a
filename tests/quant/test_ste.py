"""The straight-through estimator: other values forward, the same gradient backward."""

from __future__ import annotations

import torch

from lbdet.quant.ste import straight_through


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
