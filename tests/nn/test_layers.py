"""Quantized layers: the original's twins at full precision, its quantized weight and input below."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune, weight_norm

from lbdet.errors import UserError
from lbdet.nn import (
    ActivationQuantizer,
    BinaryActivation,
    BinaryWeight,
    DorefaActivation,
    DorefaWeight,
    LbwWeight,
    LearnedLevelsWeight,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    UniformActivation,
    UniformWeight,
    WeightQuantizer,
    quantized_input,
    quantized_weight,
)
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


PAIRS: dict[str, Callable[[], tuple[WeightQuantizer, ActivationQuantizer, int, int]]] = {
    "lbw, uniform": lambda: (LbwWeight(), UniformActivation(), 3, 4),
    "uniform, uniform": lambda: (UniformWeight(), UniformActivation(update="loss"), 4, 2),
    "dorefa, PACT": lambda: (DorefaWeight(), DorefaActivation("learned"), 2, 4),
    "binary, binary": lambda: (BinaryWeight(), BinaryActivation(), 1, 1),
    "learned levels, dorefa": lambda: (LearnedLevelsWeight(), DorefaActivation(), 2, 2),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)
ORIGINALS: dict[str, Callable[[], nn.Conv2d | nn.Linear]] = {
    "conv": lambda: conv("stride and padding"),
    "linear": lambda: nn.Linear(11, 3),
}
every_kind = pytest.mark.parametrize("kind", ORIGINALS)


def twin_of(
    original: nn.Conv2d | nn.Linear, weight: WeightQuantizer, activation: ActivationQuantizer | None = None
) -> QuantLayer:
    if isinstance(original, nn.Conv2d):
        return QuantConv2d.from_float(original, weight, activation)
    return QuantLinear.from_float(original, weight, activation)


def ready(original: nn.Conv2d | nn.Linear, pair: str) -> tuple[QuantLayer, int, int]:
    """Return a twin that is float and could have the two widths that come with it."""
    weight, activation, weight_bits, act_bits = PAIRS[pair]()
    weight.start(original.weight, weight_bits)
    activation.prepare(act_bits, original.weight.device)
    if activation.objective is not None:
        activation.set_range(act_bits, 0.1, 0 if activation.clips_negative else -1)
    return twin_of(original, weight, activation), weight_bits, act_bits


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
    original, quantizer = nn.Linear(5, 3, bias=bias), UniformWeight()
    quantizer.start(original.weight, 4)
    twin = QuantLinear.from_float(original, quantizer)
    x = torch.randn(7, 5)
    assert torch.equal(twin(x), original(x))
    twin.precision = Precision(4)
    assert torch.equal(twin(x), F.linear(x, quantizer(original.weight, 4), original.bias))


@every_kind
@every_pair
def test_at_full_precision_neither_quantizer_changes_a_bit(pair: str, kind: str) -> None:
    torch.manual_seed(0)
    original = ORIGINALS[kind]()
    twin, *_ = ready(original, pair)
    for training in (False, True):
        assert torch.equal(twin.train(training)(images()), original(images()))
    assert twin.activation_quantizer.pop_penalty() is None
    assert quantized_input(twin, x := images()) is x


@every_kind
@every_pair
def test_weights_inputs_or_both_are_quantized_as_the_precision_says(pair: str, kind: str) -> None:
    torch.manual_seed(0)
    original = ORIGINALS[kind]()
    twin, weight_bits, act_bits = ready(original, pair)
    weight = twin.weight_quantizer(original.weight, weight_bits)
    x = twin.activation_quantizer(images(), act_bits, twin.channel_dim)
    rounded = copy.deepcopy(original)
    rounded.weight.data = weight.detach()
    outputs = [original(images())]
    for precision, expected in (
        (Precision(weight_bits, None), rounded(images())),
        (Precision(None, act_bits), original(x)),
        (Precision(weight_bits, act_bits), rounded(x)),
    ):
        twin.precision = precision
        outputs.append(twin(images()))
        assert torch.equal(outputs[-1], expected)
        assert torch.equal(
            quantized_weight(twin), original.weight if precision.weight_bits is None else weight
        )
        assert torch.equal(quantized_input(twin, images()), images() if precision.act_bits is None else x)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


@every_kind
def test_the_layer_tells_its_quantizer_where_the_channels_are(kind: str) -> None:
    class Spy(BinaryActivation):
        def forward(self, x: Tensor, bits: int, dim: int) -> Tensor:
            seen.append((tuple(x.shape), bits, x.shape[dim]))
            return super().forward(x, bits, dim)

    seen: list[tuple[tuple[int, ...], int, int]] = []
    twin = twin_of(ORIGINALS[kind](), LbwWeight(), Spy())
    twin.precision = Precision(None, 1)
    twin(images())
    twin(images()[0])
    channels = 4 if kind == "conv" else 11
    assert seen == [((2, 4, 9, 11), 1, channels), ((4, 9, 11), 1, channels)]


def test_inputs_are_uniform_unless_given_otherwise_and_need_calibration() -> None:
    twins = [QuantLinear.from_float(nn.Linear(2, 2), LbwWeight()) for _ in range(2)]
    assert [type(twin.activation_quantizer) for twin in twins] == [UniformActivation, UniformActivation]
    assert twins[0].activation_quantizer is not twins[1].activation_quantizer
    twins[0].activation_quantizer.prepare(8, torch.device("cpu"))
    twins[0].precision = Precision(None, 8)
    with pytest.raises(UserError, match="8-bit activations are not calibrated"):
        twins[0](torch.ones(1, 2))


@pytest.mark.parametrize("original", [nn.Conv2d(2, 3, 3), nn.Linear(2, 3), nn.Conv2d(2, 3, 1, bias=False)])
def test_parameters_are_shared_and_the_state_dict_keeps_its_keys(original: nn.Conv2d | nn.Linear) -> None:
    twin = twin_of(original, LbwWeight())
    assert twin.weight is original.weight
    assert twin.bias is original.bias
    assert list(twin.state_dict()) == list(original.state_dict())


@every_pair
def test_the_keys_of_quantizers_are_added_to_those_of_the_original(pair: str) -> None:
    original = conv("plain")
    twin, *_ = ready(original, pair)
    keys = {key for key in twin.state_dict() if "_quantizer." not in key}
    own = {*twin.weight_quantizer.state_dict(), *twin.activation_quantizer.state_dict()}
    assert keys == original.state_dict().keys()
    assert {key.partition("_quantizer.")[2] for key in twin.state_dict()} - {""} == own


def test_a_frozen_weight_stays_frozen_and_a_mode_stays_the_mode() -> None:
    original = nn.Conv2d(2, 3, 3).eval()
    original.weight.requires_grad_(False)
    twin = QuantConv2d.from_float(original, LbwWeight())
    assert not twin.training
    assert not twin.weight_quantizer.training
    assert not twin.activation_quantizer.training
    assert not twin.weight.requires_grad
    assert twin.bias is not None
    assert twin.bias.requires_grad
    assert QuantConv2d.from_float(original.train(), LbwWeight()).training


@every_kind
def test_hooks_of_the_original_fire_on_the_twin_until_their_handles_remove_them(kind: str) -> None:
    original, seen = ORIGINALS[kind](), []
    handles = [
        original.register_forward_pre_hook(lambda *_: seen.append("before")),
        original.register_forward_hook(lambda *_: seen.append("after")),
        original.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    twin = twin_of(original, LbwWeight())
    del original
    twin(images().requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    twin(images().requires_grad_()).sum().backward()
    assert len(seen) == 3


REPARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned for good": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@every_kind
@pytest.mark.parametrize("how", REPARAMETRIZED)
def test_a_weight_that_hooks_calculate_is_quantized_and_its_parameters_train(how: str, kind: str) -> None:
    torch.manual_seed(0)
    original = ORIGINALS[kind]()
    REPARAMETRIZED[how](original)
    twin = twin_of(original, LbwWeight())
    assert list(twin.state_dict()) == list(original.state_dict())
    assert torch.equal(twin(images()), original(images()))
    twin.precision = Precision(4)
    output = twin(images())
    assert isinstance(original.weight, Tensor)
    rounded = lbw.fake_quantize(original.weight, 4)
    x, bias = images(), original.bias
    expected = F.linear(x, rounded, bias) if kind == "linear" else original._conv_forward(x, rounded, bias)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in twin.parameters())


def test_a_compiled_original_does_not_compute_for_its_twin() -> None:
    original = conv("plain")
    original.compile(backend="eager")
    twin = QuantConv2d.from_float(original, LbwWeight())
    twin.precision = Precision(2)
    assert not torch.equal(twin(images()), original(images()))


def test_a_twin_can_be_pickled() -> None:
    twin = QuantConv2d.from_float(conv("plain"), LbwWeight())
    twin.precision = Precision(4)
    read = pickle.loads(pickle.dumps(twin))
    assert torch.equal(read(images()), twin(images()))


def test_the_original_stays_what_it_is() -> None:
    original = nn.Linear(2, 3)
    before, keys = dict(vars(original)), list(original.state_dict())
    twin = QuantLinear.from_float(original, UniformWeight())
    twin.weight_quantizer.start(twin.weight, 4)
    twin.bias = None
    assert list(original.state_dict()) == keys
    assert vars(original) == before


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
    assert rounded.weight.grad is not None
    assert torch.equal(twin.weight.grad, rounded.weight.grad)


@every_kind
@every_pair
def test_the_gradient_reaches_weight_bias_input_and_the_parameters_of_both_quantizers(
    pair: str, kind: str
) -> None:
    torch.manual_seed(0)
    twin, weight_bits, act_bits = ready(ORIGINALS[kind](), pair)
    twin.precision = Precision(weight_bits, act_bits)
    x = images().requires_grad_()
    loss = twin(x).square().sum()
    penalty = twin.activation_quantizer.pop_penalty()
    (loss if penalty is None else loss + penalty).backward()
    for tensor in (x, *twin.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_a_copy_has_its_own_weight_and_the_same_precision() -> None:
    twin = QuantConv2d.from_float(conv("plain"), LbwWeight("semi", "per_tensor"))
    twin.precision = Precision(4)
    copied = copy.deepcopy(twin)
    assert copied.precision == twin.precision
    assert torch.equal(copied(images()), twin(images()))
    assert copied.weight is not twin.weight
    assert copied.weight_quantizer is not twin.weight_quantizer
    assert copied.activation_quantizer is not twin.activation_quantizer
