"""Signs and mean magnitudes, against loops over rows and every scale of a dense grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lbdet.errors import NumericsError
from lbdet.quant import binary

GRANULARITIES = ("per_tensor", "per_channel")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed_rows() -> Tensor:
    """Rows of any magnitude, subnormal to float32's largest, one of zeros and one constant."""
    rows = gaussian(7, 40) * torch.tensor([1.0, 0.0, 2.0**-140, 2.0**100, 1e-3, 1.0, 1.0])[:, None]
    rows[5] = -0.7
    rows[6] = torch.finfo(torch.float32).max
    return rows


WEIGHTS = {
    "mixed rows": mixed_rows(),
    "conv": gaussian(6, 8, 3, 3) * 0.02,
    "one element": torch.tensor([[-0.3]]),
    "zeros of both signs": torch.tensor([[0.0, -0.0, 2.0], [-0.0, -4.0, 0.0]]),
}


def strided_weights() -> list[Tensor]:
    conv = gaussian(8, 4, 3, 3)
    depthwise = gaussian(8, 1, 3, 3)
    return [
        conv,
        conv.to(memory_format=torch.channels_last),
        depthwise.to(memory_format=torch.channels_last),
        gaussian(5, 7).t(),
    ]


def strides(x: Tensor) -> list[int]:
    """Return the strides that mean something: those of dimensions longer than 1."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def binarize_rows(weight: Tensor) -> list[float]:
    """The formula in loops over a list of rows: sign times the mean magnitude, in exact sums."""
    values: list[float] = []
    for row in weight.reshape(len(weight), -1).tolist():
        mean = math.fsum(abs(w) for w in row) / len(row)
        values += [mean if w >= 0 else -mean for w in row]
    return values


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_values_are_the_sign_times_the_mean_magnitude_of_the_row(name: str, granularity: str) -> None:
    weight = WEIGHTS[name]
    q = binary.quantize(weight, granularity)
    expected = binarize_rows(weight[None] if granularity == "per_tensor" else weight)
    expected = torch.tensor(expected, dtype=torch.float64).view(weight.shape).float()
    torch.testing.assert_close(q.dequantize(), expected, rtol=1.2e-7, atol=0)
    assert (q.codes.dtype, q.scale.dtype) == (torch.int8, torch.float32)
    assert q.scale.shape == (() if granularity == "per_tensor" else (len(weight),))


def test_the_levels_are_minus_one_and_one() -> None:
    assert binary.levels().tolist() == binary.quantize(gaussian(2, 3)).levels.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    "weight", [WEIGHTS["conv"], mixed_rows()[[0, 1, 3, 4, 5, 6]]]
)  # not the subnormal row
def test_no_scale_of_a_dense_grid_has_a_smaller_squared_error(weight: Tensor) -> None:
    rows = weight.flatten(1).double()
    found = binary.quantize(weight).dequantize().flatten(1).double()
    error = (rows - found).square().sum(1)
    share = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for row, row_error in zip(rows, error, strict=True):
        scale = share[:, None] * row.abs().max()
        grid = torch.minimum((row - scale).square(), (row + scale).square()).sum(1)  # the better sign each
        assert row_error <= grid.min() * (1 + 1e-10)


def test_magnitudes_are_added_in_float64() -> None:
    weight = torch.full((1, 2**20), 2.0**-13)
    weight[0, 0] = 4096.0  # a float32 sum here would lose what is added: its unit is 2^-11
    assert binary.quantize(weight).scale.item() == torch.tensor((4096 + (2**20 - 1) / 2**13) / 2**20).item()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zero_has_a_positive_sign_and_an_all_zero_row_has_scale_zero(granularity: str) -> None:
    q = binary.quantize(torch.tensor([[0.0, -0.0], [-0.0, 0.0]]), granularity)
    assert (q.codes == 1).all()
    assert not q.scale.any()
    assert torch.equal(q.dequantize(), torch.zeros(2, 2))


def test_an_all_zero_channel_stays_zero_beside_others() -> None:
    weight = gaussian(3, 4)
    weight[1] = 0
    quantized = binary.fake_quantize(weight)
    assert not quantized[1].any()
    assert quantized[[0, 2]].all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_second_quantization_changes_nothing(granularity: str) -> None:
    once = binary.fake_quantize(gaussian(5, 40), granularity)
    assert torch.equal(binary.fake_quantize(once, granularity), once)


def test_per_channel_is_per_tensor_of_each_channel() -> None:
    weight = mixed_rows()
    stacked = torch.stack([binary.fake_quantize(row[None], "per_tensor")[0] for row in weight])
    assert torch.equal(binary.fake_quantize(weight), stacked)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_the_dequantized_weight_in_its_dtype_and_strides(
    dtype: torch.dtype, granularity: str
) -> None:
    for weight in strided_weights():
        weight = weight.to(dtype)
        before = weight.clone()
        quantized = binary.fake_quantize(weight, granularity)
        assert (quantized.dtype, strides(quantized)) == (dtype, strides(weight))
        q = binary.quantize(weight, granularity)
        assert q.scale.dtype == torch.float32
        assert torch.equal(quantized, q.dequantize().to(dtype))
        assert torch.equal(weight, before)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_gradient_to_a_weight_is_that_at_the_quantized_weight_everywhere(granularity: str) -> None:
    weight = (100 * gaussian(3, 5)).requires_grad_()
    grad = gaussian(3, 5, seed=1)
    binary.fake_quantize(weight, granularity).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_that_are_not_finite_are_refused(granularity: str, bad: float) -> None:
    weight = gaussian(2, 3)
    weight[1, 2] = bad
    for quantize in (binary.quantize, binary.fake_quantize):
        with pytest.raises(NumericsError, match="a weight has values that are not finite"):
            quantize(weight, granularity)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="granularity must be one of per_tensor, per_channel, got 'per_row'"):
        binary.quantize(torch.ones(1, 1), "per_row")


ONE = torch.tensor(1.0)
ABOVE_ONE = torch.nextafter(ONE, 2 * ONE).item()
ACTIVATIONS = [-5.0, -ABOVE_ONE, -1.0, -0.5, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, ABOVE_ONE, 5.0, math.inf]


def test_activations_become_their_sign_and_zeros_become_one() -> None:
    x = torch.tensor(ACTIVATIONS)
    assert binary.fake_quantize_activation(x).tolist() == [1.0 if v >= 0 else -1.0 for v in ACTIVATIONS]


def test_the_gradient_to_an_activation_stops_beyond_one() -> None:
    x = torch.tensor(ACTIVATIONS, requires_grad=True)
    grad = gaussian(len(ACTIVATIONS)) + 10
    binary.fake_quantize_activation(x).backward(grad)
    assert x.grad is not None
    assert x.grad.tolist() == [
        g if abs(v) <= 1 else 0.0 for v, g in zip(ACTIVATIONS, grad.tolist(), strict=True)
    ]


def test_the_gradient_to_an_activation_is_that_of_the_hard_tanh() -> None:
    x = (2 * gaussian(1000).double()).requires_grad_()
    grad = gaussian(1000, seed=1).double()
    binary.fake_quantize_activation(x).backward(grad)
    h = 1e-6
    slope = (F.hardtanh(x.detach() + h) - F.hardtanh(x.detach() - h)) / (2 * h)
    torch.testing.assert_close(x.grad, slope * grad, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_keep_their_dtype_strides_and_input(dtype: torch.dtype) -> None:
    for x in strided_weights():
        x = x.to(dtype)
        before = x.clone()
        y = binary.fake_quantize_activation(x)
        assert (y.dtype, strides(y)) == (dtype, strides(x))
        assert torch.equal(y, torch.where(x >= 0, 1, -1).to(dtype))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_activation_stays_nan_and_gets_no_gradient(dtype: torch.dtype) -> None:
    x = torch.full((20,), math.nan, dtype=dtype).requires_grad_()  # 20: the vectorised loop and its tail
    y = binary.fake_quantize_activation(x)
    y.backward(torch.ones_like(y))
    assert y.isnan().all()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_convolution_pads_binary_activations_with_zeros() -> None:
    signs = binary.fake_quantize_activation(torch.zeros(1, 1, 1, 1))
    padded_sums = F.conv2d(signs, torch.ones(1, 1, 3, 3), padding=1)
    assert padded_sums.item() == 1  # the centre; nine with padding before the quantizer
    before = binary.fake_quantize_activation(F.pad(torch.zeros(1, 1, 1, 1), (1, 1, 1, 1)))
    assert F.conv2d(before, torch.ones(1, 1, 3, 3)).item() == 9
