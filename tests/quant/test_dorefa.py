"""DoReFa weights, DoReFa and PACT activations, against the formulas in loops over Python's floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.errors import NumericsError
from lbdet.quant import dorefa
from lbdet.quant.ste import straight_through

WIDTHS = range(dorefa.MIN_BITS, dorefa.MAX_BITS + 1)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "small": lambda: gaussian(6, 8, 3, 3) * 0.02,
    "gaussian": lambda: gaussian(8, 50),
    "large, most are saturated": lambda: gaussian(8, 50) * 30,
    "with an all-zero channel": lambda: gaussian(4, 30) * torch.tensor([1.0, 0.0, 0.1, 1.0])[:, None],
    "all subnormal": lambda: gaussian(3, 20).clamp(-3, 3) * 1e-39,
    "equal and subnormal": lambda: torch.full((3, 5), -1e-40),
    "smallest subnormal": lambda: torch.tensor([[2.0**-149, -(2.0**-149), 0.0]]),
    "subnormal and normal": lambda: torch.tensor([[1e-40, -1e-40, 0.5, -0.2]]),
    "equal": lambda: torch.full((2, 30), -0.7),
    "float32 max": lambda: torch.tensor([[torch.finfo(torch.float32).max, -1e38, 0.1]]),
    "one element": lambda: torch.tensor(-0.3),
}


def strided(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return a tensor of each shape, the same in channels_last, and a transposed one."""
    tensors = [gaussian(*shape) for shape in shapes]
    return [*tensors, *(t.to(memory_format=torch.channels_last) for t in tensors), gaussian(5, 7).t()]


STRIDED = strided((8, 4, 3, 3), (8, 1, 3, 3), (1, 8, 1, 1))


def strides(x: Tensor) -> list[int]:
    """Return the strides that mean something: those of dimensions longer than 1."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def positions(weight: Tensor, bits: int) -> tuple[list[float], float]:
    """Return (2^k - 1) t of every weight, not rounded, and m, in float64."""
    squeezed = [math.tanh(w) for w in weight.double().flatten().tolist()]
    m = max(abs(s) for s in squeezed)
    return [(2**bits - 1) * (s / (2 * m) + 0.5) for s in squeezed], m


def written_rule(weight: Tensor, bits: int) -> Tensor:
    """The formula as it is written; Python's `round` is half to even too. Float64, the weight's shape."""
    n = 2**bits - 1
    where, m = positions(weight, bits)
    values = [m * (2 * round(p) / n - 1) for p in where]
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize("bits", WIDTHS)
def test_there_are_two_to_the_bits_levels_from_minus_one_to_one(bits: int) -> None:
    levels = dorefa.levels(bits)
    expected = [2 * i / (2**bits - 1) - 1 for i in range(2**bits)]
    assert levels.dtype == torch.float32
    torch.testing.assert_close(
        levels.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7
    )
    assert (levels[0], levels[-1]) == (-1, 1)
    assert levels.tolist() == [-level for level in levels.flip(0).tolist()]
    assert 0 not in levels.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_code_is_the_rounded_position_of_its_weight(name: str, bits: int) -> None:
    weight = WEIGHTS[name]()
    q = dorefa.quantize(weight, bits)
    where, m = positions(weight, bits)
    for code, position in zip(q.codes.flatten().tolist(), where, strict=True):
        assert code + 2 ** (bits - 1) == pytest.approx(position, rel=0, abs=0.5 + 1e-4)
    assert q.scale.item() == pytest.approx(m, rel=3e-7)
    assert (q.codes.dtype, q.scale.dtype, q.scale.shape) == (torch.int8, torch.float32, ())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_values_follow_the_written_rule_in_float64(name: str, bits: int) -> None:
    weight = WEIGHTS[name]().double()
    torch.testing.assert_close(
        dorefa.fake_quantize(weight, bits), written_rule(weight, bits), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_stands_for_its_level_times_the_scale(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8).view(2, -1)
    q = dorefa.DorefaTensor(codes, torch.tensor(0.3), bits)
    assert torch.equal(q.levels, dorefa.levels(bits))
    assert torch.equal(q.dequantize(), 0.3 * dorefa.levels(bits).view(2, -1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_weights_at_both_ends_keep_their_tanh_and_use_the_outermost_codes(bits: int) -> None:
    weight = torch.tensor([0.4, -0.4, 0.1])
    q = dorefa.quantize(weight, bits)
    assert q.codes[:2].tolist() == [2 ** (bits - 1) - 1, -(2 ** (bits - 1))]
    assert torch.equal(q.dequantize()[:2], weight.tanh()[:2])


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_zero_weight_lies_half_way_and_goes_to_the_even_position(bits: int) -> None:
    quantized = dorefa.fake_quantize(torch.tensor([0.0, -0.0, 0.5]), bits)
    m = math.tanh(0.5)
    assert quantized[:2].tolist() == pytest.approx([-m, -m] if bits == 1 else [m / (2**bits - 1)] * 2)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_weight_of_zeros_and_negative_zeros_has_scale_zero_and_becomes_zeros(bits: int) -> None:
    weight = torch.tensor([[0.0, -0.0], [-0.0, 0.0]], requires_grad=True)
    q = dorefa.quantize(weight, bits)
    assert q.scale == 0
    assert torch.equal(q.dequantize(), torch.zeros(2, 2))
    quantized = dorefa.fake_quantize(weight, bits)
    quantized.sum().backward()
    assert torch.equal(quantized, torch.zeros(2, 2))
    assert weight.grad is not None
    assert (weight.grad == 1).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_the_dequantized_weight_in_its_dtype_and_strides(
    dtype: torch.dtype, bits: int
) -> None:
    for weight in (w.to(dtype) for w in STRIDED):
        before = weight.clone()
        quantized = dorefa.fake_quantize(weight, bits)
        assert (quantized.dtype, strides(quantized)) == (dtype, strides(weight))
        q = dorefa.quantize(weight, bits)
        assert q.scale.dtype == torch.float32
        torch.testing.assert_close(
            quantized, q.dequantize().to(dtype), rtol=1e-6 if dtype == torch.float64 else 0, atol=0
        )
        assert torch.equal(weight, before)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, bits: int) -> None:
    weight = gaussian(20, 50).to(dtype)
    assert torch.equal(
        dorefa.fake_quantize(weight, bits), dorefa.fake_quantize(weight.float(), bits).to(dtype)
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_gradient_to_a_weight_is_that_of_tanh_without_the_rounding(bits: int) -> None:
    weight = torch.cat([gaussian(50), torch.tensor([0.0, 30.0, -30.0, 1e-40])]).double().requires_grad_()
    grad = gaussian(54, seed=1).double()
    dorefa.fake_quantize(weight, bits).backward(grad)
    m = weight.detach().tanh().abs().max()

    def not_rounded(w: Tensor) -> Tensor:
        """m (2 t - 1) with m held, of which the rounding is left out."""
        return m * (2 * (w.tanh() / (2 * m) + 0.5) - 1)

    h = 1e-6
    slope = (not_rounded(weight.detach() + h) - not_rounded(weight.detach() - h)) / (2 * h)
    torch.testing.assert_close(weight.grad, grad * slope, rtol=1e-8, atol=1e-9)
    expected = [g * (1 - math.tanh(w) ** 2) for g, w in zip(grad.tolist(), weight.tolist(), strict=True)]
    torch.testing.assert_close(
        weight.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-15
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = gaussian(200).to(dtype).requires_grad_()
    dorefa.fake_quantize(weight, 4).sum().backward()
    assert weight.grad is not None
    exact = [1 - math.tanh(w) ** 2 for w in weight.tolist()]
    expected = torch.tensor(exact, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(weight.grad, expected)  # the dtype as well


def without_m(weight: Tensor, bits: int) -> Tensor:
    """The paper's weights, in [-1, 1]."""
    m = weight.detach().tanh().abs().max()
    scaled = weight.tanh() / m
    return straight_through(scaled, written_rule(weight.detach(), bits) / m)


def through_conv_and_batch_norm(
    weight: Tensor, quantizer: Callable[[Tensor, int], Tensor], bits: int, training: bool
) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the gradient to the weight of a loss that is not linear in them; float64."""
    weight = weight.clone().requires_grad_()
    batch_norm = nn.BatchNorm2d(len(weight), eps=1e-30).double().train(training)
    with torch.no_grad():
        batch_norm.weight.copy_(gaussian(len(weight), seed=2))
        batch_norm.bias.copy_(gaussian(len(weight), seed=3))
    x = gaussian(4, 3, 6, 6, seed=4).double()
    y = batch_norm(F.conv2d(x, quantizer(weight, bits), padding=1))
    (gradient,) = torch.autograd.grad((y * gaussian(*y.shape, seed=5)).tanh().sum(), weight)
    return y.detach(), gradient


@pytest.mark.parametrize("spread", [0.001, 0.05, 3.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_batch_norm_in_training_makes_the_factor_m_vanish(bits: int, spread: float) -> None:
    weight = spread * gaussian(5, 3, 3, 3).double()
    ours = through_conv_and_batch_norm(weight, dorefa.fake_quantize, bits, training=True)
    papers = through_conv_and_batch_norm(weight, without_m, bits, training=True)
    assert ours[1].abs().max() > 0.01
    for a, b in zip(ours, papers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


def test_a_frozen_batch_norm_needs_the_factor_m() -> None:
    weight = 0.05 * gaussian(5, 3, 3, 3).double()
    wanted, _ = through_conv_and_batch_norm(weight, lambda w, _: w, 8, training=False)
    ours, _ = through_conv_and_batch_norm(weight, dorefa.fake_quantize, 8, training=False)
    papers, _ = through_conv_and_batch_norm(weight, without_m, 8, training=False)
    assert (ours - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert (papers - wanted).abs().max() > wanted.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = gaussian(2, 3)
    weight[1, 2] = bad
    for quantize in (dorefa.quantize, dorefa.fake_quantize):
        with pytest.raises(NumericsError, match="a weight has values that are not finite"):
            quantize(weight, 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_outside_the_range_is_refused(bits: int) -> None:
    one = torch.ones(1)
    for call in (
        lambda: dorefa.levels(bits),
        lambda: dorefa.quantize(one, bits),
        lambda: dorefa.fake_quantize(one, bits),
        lambda: dorefa.fake_quantize_activation(one, one[0], bits),
    ):
        with pytest.raises(ValueError, match=f"format 'dorefa' has widths 1 to 8, got {bits}"):
            call()


def activations(clip: float) -> Tensor:
    """Return float32 inputs on both sides of and on both ends of [0, clip], and far away."""
    ends = torch.tensor([0.0, -0.0, clip])
    near = [torch.nextafter(ends, torch.tensor(side)) for side in (-math.inf, math.inf)]
    far = torch.tensor([-1e30, 1e30, -math.inf, math.inf])
    return torch.cat([clip * (gaussian(300) + 0.5), ends, *near, far])


CLIPS = [0.01, 1.0, 2.7, 300.0]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_activations_follow_the_written_rule_in_float64(bits: int, clip: float) -> None:
    n, x = 2**bits - 1, activations(clip).double()
    y = dorefa.fake_quantize_activation(x, torch.tensor(clip), bits)
    c = torch.tensor(clip).item()
    expected = [c * round(n * min(max(v / c, 0.0), 1.0)) / n for v in x.tolist()]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_an_activation_half_way_between_two_values_goes_to_the_even_one() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 13.5, 14.5])
    down, up = (torch.nextafter(x, torch.tensor(side)) for side in (-math.inf, math.inf))
    clip = torch.tensor(15.0)  # 4 bits: steps of 1
    assert dorefa.fake_quantize_activation(x, clip, 4).tolist() == [0, 2, 2, 14, 14]
    assert dorefa.fake_quantize_activation(down, clip, 4).tolist() == [0, 1, 2, 13, 14]
    assert dorefa.fake_quantize_activation(up, clip, 4).tolist() == [1, 2, 3, 14, 15]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_activations_are_what_int8_inference_computes_bit_for_bit(bits: int, clip: float) -> None:
    x = activations(clip)
    scale = torch.tensor(clip) / (2**bits - 1)  # ONNX: QuantizeLinear and DequantizeLinear with this scale
    codes = (x / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    assert torch.equal(dorefa.fake_quantize_activation(x, torch.tensor(clip), bits), codes * scale)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_second_quantization_of_activations_changes_nothing(bits: int) -> None:
    once = dorefa.fake_quantize_activation(activations(2.7), torch.tensor(2.7), bits)
    assert torch.equal(dorefa.fake_quantize_activation(once, torch.tensor(2.7), bits), once)
    assert {0.0} < set(once.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_activations_keep_their_dtype_strides_and_input(bits: int, dtype: torch.dtype) -> None:
    clip = torch.tensor(1.3)
    for x in (t.to(dtype) for t in STRIDED):
        before = x.clone()
        y = dorefa.fake_quantize_activation(x, clip, bits)
        assert (y.dtype, strides(y)) == (dtype, strides(x))
        exact = dorefa.fake_quantize_activation(x.double(), clip, bits)
        torch.testing.assert_close(y, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
        assert torch.equal(x, before)
    assert clip == torch.tensor(1.3)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_gradients_of_activations_follow_the_written_rule(bits: int, clip: float) -> None:
    x = activations(clip).requires_grad_()
    c = torch.tensor(clip, requires_grad=True)
    grad = gaussian(len(x), seed=1)
    dorefa.fake_quantize_activation(x, c, bits).backward(grad)
    assert x.grad is not None
    assert c.grad is not None
    pairs = list(zip((x / c).tolist(), grad.tolist(), strict=True))
    assert x.grad.tolist() == [g if 0 <= share <= 1 else 0.0 for share, g in pairs]
    assert c.grad.shape == ()
    assert c.grad.item() == pytest.approx(math.fsum(g for share, g in pairs if share >= 1), rel=1e-5)


def test_the_gradients_are_those_of_the_clipping_without_the_rounding() -> None:
    x = (2 * gaussian(500).double()).requires_grad_()
    c = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    grad = gaussian(500, seed=1).double()
    dorefa.fake_quantize_activation(x, c, 4).backward(grad)

    def clipped(x: Tensor, clip: Tensor) -> Tensor:
        return clip * (x / clip).clamp(0, 1)

    h, at = 1e-6, (x.detach(), c.detach())
    x_slope = (clipped(at[0] + h, at[1]) - clipped(at[0] - h, at[1])) / (2 * h)
    c_slope = (clipped(at[0], at[1] + h) - clipped(at[0], at[1] - h)) / (2 * h)
    torch.testing.assert_close(x.grad, grad * x_slope, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(c.grad, (grad * c_slope).sum(), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_activations_are_compared_with_the_clip_itself_not_with_its_rounding(dtype: torch.dtype) -> None:
    clips = torch.tensor([1.0]).nextafter(
        torch.tensor([0.0, 2.0])
    )  # next to 1, to which both round in `dtype`
    for clip, x_grad, clip_grad in zip(clips, (0, 1), (1, 0), strict=True):
        x = torch.ones(1, dtype=dtype, requires_grad=True)
        c = clip.clone().requires_grad_()
        dorefa.fake_quantize_activation(x, c, 8).backward(torch.ones(1, dtype=dtype))
        assert x.grad is not None
        assert c.grad is not None
        assert (x.grad.item(), c.grad.item()) == (x_grad, clip_grad)
        assert (x.grad.dtype, c.grad.dtype) == (dtype, torch.float32)


def test_the_gradient_to_the_clip_is_summed_in_float32_for_half_activations() -> None:
    x = torch.full((3000,), 2.0, dtype=torch.float16, requires_grad=True)
    clip = torch.tensor(1.0, requires_grad=True)
    dorefa.fake_quantize_activation(x, clip, 4).backward(torch.full_like(x, 100.0))
    assert clip.grad is not None
    assert clip.grad.item() == 300_000  # beyond float16


@pytest.mark.parametrize("x_trains, clip_trains", [(True, False), (False, True)])
def test_only_what_trains_gets_a_gradient(x_trains: bool, clip_trains: bool) -> None:
    x = torch.tensor([0.5, 2.0], requires_grad=x_trains)
    clip = torch.tensor(1.0, requires_grad=clip_trains)
    dorefa.fake_quantize_activation(x, clip, 4).sum().backward()
    assert (None if x.grad is None else x.grad.tolist()) == ([1.0, 0.0] if x_trains else None)
    assert (None if clip.grad is None else clip.grad.item()) == (1.0 if clip_trains else None)


def test_a_gradient_that_is_not_finite_does_not_leak_out_of_the_clipped_range() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    clip = torch.tensor(1.0, requires_grad=True)
    dorefa.fake_quantize_activation(x, clip, 4).backward(torch.tensor([math.inf, 1.0, 3.0]))
    assert x.grad is not None
    assert clip.grad is not None
    assert (x.grad.tolist(), clip.grad.item()) == ([0.0, 1.0, 0.0], 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_input_and_the_clip_are_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    x, clip = torch.ones(50, dtype=dtype, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dorefa.fake_quantize_activation(x, clip, 4)
    assert sorted(kept) == sorted([x.data_ptr(), clip.data_ptr()])


def test_a_nan_activation_stays_nan() -> None:
    assert dorefa.fake_quantize_activation(torch.full((20,), math.nan), torch.tensor(1.0), 4).isnan().all()
