"""What every activation quantizer promises, how its range is kept and trained, and what it needs first."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from lbdet.errors import UserError
from lbdet.nn import (
    FORMATS,
    ActivationQuantizer,
    BinaryActivation,
    DorefaActivation,
    LbwWeight,
    QuantConv2d,
    QuantLinear,
    UniformActivation,
)
from lbdet.precision import Precision
from lbdet.quant import activations, uniform

FORMS: dict[str, Callable[[], ActivationQuantizer]] = {
    "uniform learned": lambda: UniformActivation(),
    "uniform loss": lambda: UniformActivation(update="loss"),
    "uniform average": lambda: UniformActivation(update="average"),
    "uniform fixed": lambda: UniformActivation(update="fixed"),
    "uniform channel-aware": lambda: UniformActivation("channel_aware"),
    "dorefa": lambda: DorefaActivation(),
    "dorefa clip 6": lambda: DorefaActivation(6.0),
    "dorefa learned": lambda: DorefaActivation("learned"),
    "binary": lambda: BinaryActivation(),
}
UNIFORM = tuple(form for form in FORMS if form.startswith("uniform"))
WITH_RANGE = (*UNIFORM, "dorefa learned")
CASES = [(form, bits) for form in FORMS for bits in FORMS[form]().widths]
SIDES = ("one-sided", "two-sided")
CPU = torch.device("cpu")


def maps(side: str = "two-sided", seed: int = 0) -> Tensor:
    """Feature maps with zeros of both signs, one in the range of a ReLU."""
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(seed))
    x = x * torch.tensor([1.0, 0.3, 2.0, 0.5]).view(4, 1, 1)
    x = x.relu() if side == "one-sided" else F.leaky_relu(x, 0.7)
    x[0, 0, 0, :2] = torch.tensor([0.0, -0.0])
    return x


def calibrated(form: str, bits: int, side: str = "two-sided", training: bool = False) -> ActivationQuantizer:
    """Return a quantizer with the range of `maps(side)`, a negative lowest code where that is two-sided."""
    quantizer = FORMS[form]()
    quantizer.prepare(bits, CPU)
    if quantizer.objective is not None:
        x = maps(side).clamp_min(0) if quantizer.clips_negative else maps(side)
        scale, low = activations.direct_range(x, bits, quantizer.objective, -3)
        two_sided = side == "two-sided" and not quantizer.clips_negative
        quantizer.set_range(bits, scale, min(low, -1) if two_sided else low)
    return quantizer.train(training)


def levels_of(quantizer: ActivationQuantizer, bits: int) -> Tensor:
    """Return the representable values, float64."""
    if isinstance(quantizer, BinaryActivation):
        return torch.tensor([-1.0, 1.0]).double()
    found = quantizer.range(bits)
    if found is None:
        assert isinstance(quantizer, DorefaActivation)
        assert isinstance(quantizer.clip, float)
        return torch.linspace(0, quantizer.clip, 1 << bits).double()
    scale, low, high = found
    return scale * torch.arange(low, high + 1).double()


def log_scale_of(quantizer: ActivationQuantizer, bits: int) -> nn.Parameter:
    return quantizer.get_parameter(f"log_scale_{bits}")


def test_every_format_is_among_the_forms() -> None:
    assert {FORMS[form]().format for form in FORMS} == {name for name, f in FORMATS.items() if f.activation}
    assert {type(FORMS[form]()) for form in FORMS} == {f.activation for f in FORMATS.values() if f.activation}


# ----------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form, bits", CASES)
def test_every_value_is_the_nearest_level(form: str, bits: int, side: str, training: bool) -> None:
    quantizer = calibrated(form, bits, side, training)
    x = maps(side)
    quantized = quantizer(x, bits, -3).detach().double()
    levels = levels_of(quantizer, bits)  # after the forward pass: an average moves first
    near = (x.double().unsqueeze(-1) - levels).abs().amin(-1)
    assert len(levels) == 2**bits
    distance = (quantized.unsqueeze(-1) - levels).abs().amin(-1)
    assert (distance <= 1e-6 * levels.abs().amax()).all()
    assert ((quantized - x).abs() <= near + 1e-6 * levels.abs().amax()).all()
    assert torch.equal(x, maps(side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form, bits", [case for case in CASES if case[0] != "binary"])
def test_zeros_of_both_signs_stay_zero(form: str, bits: int, side: str) -> None:
    x = maps(side)
    assert (calibrated(form, bits, side)(x, bits, -3)[x == 0] == 0).all()


def test_binary_is_the_one_format_that_turns_zeros_into_ones() -> None:
    assert torch.equal(
        BinaryActivation()(torch.tensor([0.0, -0.0, -1e-9]), 1, -1), torch.tensor([1.0, 1.0, -1])
    )


@pytest.mark.parametrize("form, bits", [case for case in CASES if FORMS[case[0]]().clips_negative])
def test_negative_values_become_zero_where_the_format_says_so(form: str, bits: int) -> None:
    quantized = calibrated(form, bits)(maps(), bits, -3)
    assert (quantized[maps() < 0] == 0).all()
    assert (quantized > 0).any()


def test_no_other_format_clips_negative_values() -> None:
    clipping = [form for form in FORMS if FORMS[form]().clips_negative]
    assert clipping == ["dorefa", "dorefa clip 6", "dorefa learned"]
    for form in FORMS.keys() - clipping:
        bits = 1 if form == "binary" else 4
        assert (calibrated(form, bits)(maps(), bits, -3) < 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_dtype_and_strides_are_kept(form: str, dtype: torch.dtype) -> None:
    bits, x = 1 if form == "binary" else 4, maps().to(dtype)
    expected = calibrated(form, bits)(x, bits, -3)
    for layout in (x, x.to(memory_format=torch.channels_last), x[:, :, :, ::2]):
        quantized = calibrated(form, bits)(layout, bits, -3)
        assert quantized.dtype == dtype
        if layout.numel() == x.numel():
            assert quantized.stride() == layout.stride()
            assert torch.equal(quantized, expected)
        else:
            assert torch.equal(quantized, expected[:, :, :, ::2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_empty_input_passes_and_so_does_its_gradient(form: str, training: bool) -> None:
    """As of the roi heads of a detector that proposes nothing."""
    bits = 1 if form == "binary" else 4
    for shape, dim in (((0, 4, 5, 6), -3), ((0, 7), -1), ((2, 0, 7), -1)):
        quantizer = calibrated(form, bits, training=training)
        before = copy.deepcopy(quantizer.state_dict())
        x = torch.zeros(shape, requires_grad=True)
        quantized = quantizer(x, bits, dim)
        assert quantized.shape == shape
        quantized.sum().backward()
        assert quantizer.pop_penalty() is None
        assert all(p.grad is None or p.grad == 0 for p in quantizer.parameters())
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("form, bits", [case for case in CASES if case[1] in (1, 4)])
def test_activations_on_a_gpu_are_quantized_there_as_on_the_cpu(form: str, bits: int) -> None:
    for training in (False, True):
        here, there = (calibrated(form, bits, training=training) for _ in range(2))
        quantized = there.cuda()(maps().cuda(), bits, -3)
        assert quantized.is_cuda
        torch.testing.assert_close(quantized.cpu(), here(maps(), bits, -3))
    fresh = FORMS[form]()
    fresh.prepare(bits, torch.device("cuda"))
    assert all(tensor.is_cuda for tensor in fresh.state_dict().values())


# ------------------------------------------------------------------------------------------------------ range


@pytest.mark.parametrize("form", WITH_RANGE)
def test_without_calibration_a_forward_pass_is_refused(form: str) -> None:
    quantizer = FORMS[form]()
    quantizer.prepare(4, CPU)
    quantizer.prepare(2, CPU)
    quantizer.set_range(2, 0.5, 0)
    assert not quantizer.calibrated(4)
    assert quantizer.range(4) is None
    with pytest.raises(UserError) as error:
        quantizer(maps(), 4, -3)
    text = "4-bit activations are not calibrated; call lbdet.calibrate_activations with some images"
    assert str(error.value) == text
    quantizer(maps(), 2, -3)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in WITH_RANGE])
def test_a_format_without_a_range_needs_no_calibration(form: str) -> None:
    quantizer = FORMS[form]()
    quantizer.prepare(1, CPU)
    assert quantizer.calibrated(1)
    assert quantizer.range(1) is None
    assert quantizer.objective is None
    assert not quantizer.state_dict()
    quantizer(maps(), 1, -3)


@pytest.mark.parametrize("form", WITH_RANGE)
def test_a_range_is_set_in_place_and_read_back(form: str) -> None:
    quantizer = FORMS[form]()
    quantizer.prepare(4, CPU)
    held = quantizer.state_dict(keep_vars=True)
    for scale, low in ((0.3, -3), (7e-5, 0), (2.0, -15)):
        quantizer.set_range(4, scale, low)
        assert quantizer.calibrated(4)
        assert quantizer.range(4) == (pytest.approx(scale, rel=1e-6), low, low + 15)
    assert held.keys() == {"log_scale_4", "low_4"}
    assert all(tensor is held[name] for name, tensor in quantizer.state_dict(keep_vars=True).items())


@pytest.mark.parametrize("form", WITH_RANGE)
def test_a_width_is_prepared_once_and_beside_the_others(form: str) -> None:
    quantizer = calibrated(form, 4)
    before = quantizer.range(4), log_scale_of(quantizer, 4)
    quantizer.prepare(4, CPU)
    quantizer.prepare(8, CPU)
    assert quantizer.range(4) == before[0]
    assert log_scale_of(quantizer, 4) is before[1]
    assert quantizer.range(8) is None
    assert quantizer.state_dict().keys() == {"log_scale_4", "low_4", "log_scale_8", "low_8"}


@pytest.mark.parametrize("form", WITH_RANGE)
def test_a_state_dict_carries_whether_and_to_what_a_range_was_set(form: str) -> None:
    source, loaded = calibrated(form, 4), nn.ModuleDict({"inner": FORMS[form]()})
    quantizer = loaded["inner"]
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.prepare(4, CPU)
    empty = copy.deepcopy(loaded.state_dict())
    assert not quantizer.calibrated(4)
    loaded.load_state_dict({f"inner.{name}": value for name, value in source.state_dict().items()})
    assert quantizer.calibrated(4)
    assert quantizer.range(4) == source.range(4)
    assert torch.equal(quantizer(maps(), 4, -3), source(maps(), 4, -3))
    loaded.load_state_dict(empty)
    assert not quantizer.calibrated(4)
    with pytest.raises(UserError, match="not calibrated"):
        quantizer(maps(), 4, -3)


@pytest.mark.parametrize("form", WITH_RANGE)
def test_a_range_whose_buffers_are_written_or_replaced_is_followed(form: str) -> None:
    quantizer, other = calibrated(form, 4), FORMS[form]()
    other.prepare(4, CPU)
    other.set_range(4, 0.05, -3)
    average = AveragedModel(quantizer, use_buffers=True)
    assert average.module.range(4) == quantizer.range(4)
    average.update_parameters(other)
    assert average.module.range(4) == other.range(4)
    quantizer.load_state_dict(other.state_dict(), assign=True)
    assert quantizer.range(4) == other.range(4)


@pytest.mark.parametrize("form", WITH_RANGE)
def test_a_range_is_read_from_its_buffer_once_so_that_no_forward_pass_waits(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer, reads, read = calibrated(form, 4), [], Tensor.__int__
    monkeypatch.setattr(Tensor, "__int__", lambda tensor: (reads.append(1), read(tensor))[1])
    for _ in range(3):
        quantizer(maps(), 4, -3)
    assert len(reads) == 1


@pytest.mark.parametrize("form", WITH_RANGE)
def test_setting_a_range_leaves_a_copy_alone_and_follows_a_load(form: str) -> None:
    quantizer = calibrated(form, 4)
    copied, before = copy.deepcopy(quantizer), quantizer.range(4)
    quantizer.set_range(4, 9.0, -2)
    assert copied.range(4) == before
    quantizer.load_state_dict(copied.state_dict())
    assert quantizer.range(4) == before


# --------------------------------------------------------------------------------------------------- training


def test_only_learned_ranges_are_trained() -> None:
    trained = {form: log_scale_of(calibrated(form, 4), 4).requires_grad for form in WITH_RANGE}
    assert [form for form in WITH_RANGE if not trained[form]] == ["uniform average", "uniform fixed"]


@pytest.mark.parametrize("form, bits", [case for case in CASES if case[1] in (1, 2, 4)])
def test_the_gradient_passes_inside_the_range_and_stops_outside(form: str, bits: int) -> None:
    quantizer, x = calibrated(form, bits, training=True), maps().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    quantizer(x, bits, -3).backward(grad)
    levels = levels_of(quantizer, bits)
    inside = (x >= levels[0] * (1 + 1e-7)) & (x <= levels[-1] * (1 + 1e-7))
    assert x.grad is not None
    assert torch.equal(x.grad, grad * inside)
    assert 0 < inside.sum() < inside.numel()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", ["uniform learned", "uniform channel-aware"])
def test_a_learned_scale_has_the_gradient_of_lsq(form: str, side: str) -> None:
    """By the paper's formula; divided by the scale as `uniform.positive` says."""
    quantizer, x = calibrated(form, 4, side), maps(side)
    found = quantizer.range(4)
    assert found is not None
    scale, low, high = found
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    quantizer(x, 4, -3).backward(grad)
    steps = x / scale
    slope = torch.where((steps < low) | (steps > high), steps.clamp(low, high), steps.round() - steps)
    factor = (4 * 5 * 6 * high) ** -0.5  # the elements of one image
    expected = (slope * grad).sum() * factor / scale
    torch.testing.assert_close(log_scale_of(quantizer, 4).grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["uniform average", "uniform fixed", "uniform loss"])
def test_the_gradient_of_the_task_does_not_reach_other_scales(form: str) -> None:
    quantizer, x = calibrated(form, 4, training=True), maps().requires_grad_()
    quantizer(x, 4, -3).square().sum().backward()
    assert log_scale_of(quantizer, 4).grad is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", WITH_RANGE)
def test_a_forward_pass_moves_nothing_but_an_average_in_training(form: str, training: bool) -> None:
    quantizer = calibrated(form, 4, training=training)
    quantizer.set_range(4, 1e-3, -2)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(maps(), 4, -3)
    same = all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert same == (form != "uniform average" or not training)
    assert quantizer.range(4) is not None
    assert quantizer.get_buffer("low_4") == -2


@pytest.mark.parametrize("objective", activations.OBJECTIVES)
@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_an_average_moves_to_the_better_scale(objective: str, factor: float) -> None:
    quantizer = UniformActivation(objective, "average")
    scale, low = activations.direct_range(maps(), 4, objective, -3)
    quantizer.prepare(4, CPU)
    quantizer.set_range(4, factor * scale, low)
    errors, distance = [], []
    for _ in range(150):
        found = quantizer.range(4)
        assert found is not None
        quantized = quantizer.eval()(maps(), 4, -3)
        errors.append(activations.error(maps(), quantized, objective, -3).item())
        distance.append(abs(math.log(found[0] / scale)))
        quantizer.train()(maps(), 4, -3)
    step = distance[0] - distance[1]
    assert 0 < step <= 0.05 * 0.5 * math.log(2) * (1 + 1e-3)  # half an octave, damped
    assert distance[-1] < 0.25 * math.log(2)  # the candidates' distance
    best = uniform.fake_quantize(maps(), torch.tensor(scale), low, low + 15)
    assert errors[-1] < 1.2 * activations.error(maps(), best, objective, -3) < 0.5 * errors[0]


@pytest.mark.parametrize("objective", activations.OBJECTIVES)
@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_loss_leaves_a_penalty_once_whose_gradient_reaches_the_scale_only(
    objective: str, factor: float
) -> None:
    scale, low = activations.direct_range(maps(), 4, objective, -3)
    quantizer = UniformActivation(objective, "loss")
    quantizer.prepare(4, CPU)
    quantizer.set_range(4, factor * scale, low)
    x = maps().requires_grad_()
    quantized = quantizer(x, 4, -3)
    penalty = quantizer.pop_penalty()
    assert penalty is not None
    assert quantizer.pop_penalty() is None
    torch.testing.assert_close(penalty.detach(), activations.error(maps(), quantized.detach(), objective, -3))
    penalty.backward()
    assert x.grad is None
    slope = log_scale_of(quantizer, 4).grad
    assert slope is not None
    assert slope.sign() == (1 if factor > 1 else -1)


def test_the_penalty_of_a_layer_used_several_times_is_the_mean_of_its_uses() -> None:
    quantizer = calibrated("uniform loss", 4, training=True)
    penalties, inputs = [], (maps(), 2 * maps(), maps() - 1)
    for x in inputs:
        quantizer(x, 4, -3)
        penalties.append(quantizer.pop_penalty())
    for x in inputs:
        quantizer(x, 4, -3)
    together = quantizer.pop_penalty()
    assert together is not None
    assert quantizer.pop_penalty() is None
    torch.testing.assert_close(together, torch.stack(penalties).mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("form, training", [(form, form != "uniform loss") for form in FORMS])
def test_no_penalty_is_left_without_a_loss_or_in_evaluation(form: str, training: bool) -> None:
    bits = 1 if form == "binary" else 4
    quantizer = calibrated(form, bits, training=training)
    quantizer(maps(), bits, -3)
    assert quantizer.pop_penalty() is None


@pytest.mark.parametrize(
    "form, factor",  # too large a clip of PACT has no gradient
    [("uniform learned", 0.1), ("uniform learned", 4.0), ("uniform loss", 0.1), ("uniform loss", 4.0),
     ("dorefa learned", 0.1)],
)  # fmt: skip
def test_training_brings_a_wrong_scale_nearer_to_its_input(form: str, factor: float) -> None:
    x = maps("one-sided")
    quantizer = calibrated(form, 4, "one-sided", training=True)
    scale, low, _ = quantizer.range(4) or (0, 0, 0)
    quantizer.set_range(4, factor * scale, low)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    errors = []
    for _ in range(60):
        squared = (quantizer(x, 4, -3) - x).square().mean()
        errors.append(squared.item())
        optimizer.zero_grad()
        penalty = quantizer.pop_penalty()
        (squared if penalty is None else penalty).backward()
        optimizer.step()
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_step_on_pacts_parameter_changes_the_clip_by_its_own_gradient(bits: int) -> None:
    quantizer, x = calibrated("dorefa learned", bits, training=True), maps()
    quantizer.set_range(bits, 0.8 / (2**bits - 1), 0)
    grad = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    rate = 1e-5
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=rate)
    quantizer(x, bits, -3).backward(grad)
    optimizer.step()
    scale, low, high = quantizer.range(bits) or (0, 0, 0)
    slope = grad[x >= 0.8].sum().item()
    assert low == 0
    assert slope > 5
    assert scale * high - 0.8 == pytest.approx(-rate * slope, rel=1e-2)


@pytest.mark.parametrize("clip", [1.0, 1, 6.0])
def test_a_clip_that_is_given_stays_as_it_is(clip: float) -> None:
    quantizer = DorefaActivation(clip)
    quantized = quantizer(torch.tensor([-3.0, 0.0, 0.5 * clip, clip, 100.0]), 1, -1)
    assert quantized.tolist() == [0, 0, 0, clip, clip]
    assert not list(quantizer.parameters())


# ----------------------------------------------------------------------------------------------------- layers


def layer_of(original: nn.Conv2d | nn.Linear, form: str, bits: int) -> QuantConv2d | QuantLinear:
    quantizers = LbwWeight(), calibrated(form, bits)
    if isinstance(original, nn.Conv2d):
        layer = QuantConv2d.from_float(original, *quantizers)
    else:
        layer = QuantLinear.from_float(original, *quantizers)
    layer.precision = Precision(None, bits)
    return layer


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_is_added_to_the_quantized_input(
    form: str, padding_mode: Literal["zeros", "reflect"]
) -> None:
    torch.manual_seed(0)
    original = nn.Conv2d(4, 6, 3, padding=1, padding_mode=padding_mode)
    for bits in (2, 4) if form != "binary" else (1,):
        layer = layer_of(original, form, bits).eval()
        quantized = layer.activation_quantizer(maps(), bits, -3)
        mode = "constant" if padding_mode == "zeros" else padding_mode
        padded = F.pad(quantized, (1, 1, 1, 1), mode=mode)
        expected = F.conv2d(padded, original.weight, original.bias)
        torch.testing.assert_close(layer(maps()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_takes_one_image_without_a_batch(form: str, training: bool) -> None:
    torch.manual_seed(0)
    bits, original = 1 if form == "binary" else 4, nn.Conv2d(4, 6, 3, padding=1)
    alone, batched = (layer_of(original, form, bits).train(training) for _ in range(2))
    outputs = alone(maps()[0]), batched(maps()[:1])[0]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for layer, output in zip((alone, batched), outputs, strict=True):
        penalty = layer.activation_quantizer.pop_penalty()
        (output.square().sum() if penalty is None else penalty).backward()
    parameters = (layer.activation_quantizer.parameters() for layer in (alone, batched))
    for a, b in zip(*parameters, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(7, 4), (7, 3, 4), (4,)])
def test_a_linear_layer_takes_features_tokens_and_a_vector(
    form: str, training: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    bits, original = 1 if form == "binary" else 4, nn.Linear(4, 5)
    layer = layer_of(original, form, bits).train(training)
    x = torch.randn(shape)
    expected = F.linear(
        copy.deepcopy(layer).activation_quantizer(x, bits, -1), original.weight, original.bias
    )
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == (*shape[:-1], 5)


def test_the_channels_of_a_channel_aware_average_are_those_of_the_layer() -> None:
    """`[C, H, W]` maps and `[N, F]` features of the same values, moved to the same scale."""
    conv = layer_of(nn.Conv2d(4, 6, 1), "uniform average", 4)
    linear = layer_of(nn.Linear(4, 6), "uniform average", 4)
    scales = []
    for layer, x in ((conv, maps()), (linear, maps().movedim(1, -1).reshape(-1, 4))):
        layer.activation_quantizer = UniformActivation("channel_aware", "average")
        layer.activation_quantizer.prepare(4, CPU)
        layer.activation_quantizer.set_range(4, 1e-3, -2)
        layer.train()(x)
        scales.append(layer.activation_quantizer.range(4))
    assert scales[0] == scales[1]
    assert scales[0] is not None
    assert scales[0][0] > 1e-3


# ---------------------------------------------------------------------------------- copies, options and print


@pytest.mark.parametrize("form", FORMS)
def test_it_can_be_copied_and_pickled_between_forward_and_backward(form: str) -> None:
    bits = 1 if form == "binary" else 4
    quantizer = calibrated(form, bits, training=True)
    quantizer(maps(), bits, -3)
    for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert copied.training
        assert copied.pop_penalty() is None
        assert torch.equal(copied.eval()(maps(), bits, -3), calibrated_like(quantizer)(maps(), bits, -3))
        assert all(a is not b for a, b in zip(copied.parameters(), quantizer.parameters(), strict=True))
    assert (quantizer.pop_penalty() is not None) == (form == "uniform loss")


def calibrated_like(quantizer: ActivationQuantizer) -> ActivationQuantizer:
    """Return a twin in evaluation mode that is built anew."""
    form = next(form for form in FORMS if repr(FORMS[form]()) == repr(quantizer))
    bits = 1 if form == "binary" else 4
    twin = calibrated(form, bits)
    twin.load_state_dict(quantizer.state_dict())
    return twin


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: UniformActivation("mae"), "objective must be one of mse, channel_aware, got 'mae'"),
        (
            lambda: UniformActivation(update="ema"),
            "update must be one of learned, average, loss, fixed, got 'ema'",
        ),
        (lambda: DorefaActivation(0.0), "clip must be positive or 'learned', got 0.0"),
        (lambda: DorefaActivation(-1), "clip must be positive or 'learned', got -1"),
        (lambda: DorefaActivation(math.inf), "clip must be positive or 'learned', got inf"),
        (lambda: DorefaActivation(math.nan), "clip must be positive or 'learned', got nan"),
        (lambda: DorefaActivation("pact"), "clip must be positive or 'learned', got 'pact'"),
    ],
)
def test_options_that_do_not_exist_are_refused(build: Callable[[], ActivationQuantizer], text: str) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value) == text


def test_a_quantizer_prints_what_it_is() -> None:
    assert repr(UniformActivation()) == "UniformActivation(objective='mse', update='learned')"
    assert repr(DorefaActivation("learned")) == "DorefaActivation(clip='learned')"
    assert repr(DorefaActivation()) == "DorefaActivation(clip=1.0)"
    assert repr(BinaryActivation()) == "BinaryActivation()"
