"""A float model becomes a quantized one: which layers, at which width, and what is said about the others."""

from __future__ import annotations

import gc
import json
import math
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbdet.convert import (
    Override,
    WeightFormat,
    check_width,
    coverage,
    coverage_json,
    coverage_summary,
    hold_weights,
    model_bytes,
    quantize_model,
    quantized_layers,
    scheduled_layers,
    set_float,
    set_precision,
    set_scheduled_precision,
)
from lbdet.errors import NumericsError, UserError
from lbdet.models import MODELS, build_detector
from lbdet.nn import (
    FORMATS,
    ActivationQuantizer,
    BinaryActivation,
    LbwWeight,
    QuantConv2d,
    QuantLinear,
    UniformActivation,
    UniformWeight,
    WeightQuantizer,
)  # fmt: skip
from lbdet.nn.batch_norm import recalibrate_bn
from lbdet.precision import FLOAT, Precision

HEAVY = {"fasterrcnn_resnet50_fpn", "ssd300_vgg16"}


class OddConv(nn.Conv2d):
    """A convolution of somebody else's, whose forward may do anything."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.bn = nn.BatchNorm2d(4)
        self.odd = OddConv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.bn(self.conv(x)).relu())


class Net(nn.Module):
    """A stem, a block with a grouped and an odd convolution, a transposed one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block = Block()
        self.up = nn.ConvTranspose2d(4, 4, 2, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.block(self.stem(x))).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def widths(model: nn.Module) -> dict[str, str]:
    return {name: str(layer.precision) for name, layer in quantized_layers(model).items()}


def test_exact_types_are_swapped_in_place_and_subclasses_stay_float() -> None:
    original = net()
    model, _ = quantize_model(original)
    assert model is original
    assert [type(m) for m in (model.stem, model.block.conv, model.head)] == [
        QuantConv2d,
        QuantConv2d,
        QuantLinear,
    ]
    assert type(model.block.odd) is OddConv
    assert type(model.up) is nn.ConvTranspose2d
    assert list(quantized_layers(model)) == scheduled_layers(model) == ["stem", "block.conv", "head"]


def test_parameters_and_state_dict_keys_stay_what_they_were() -> None:
    model = net()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    quantize_model(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(model.state_dict()) == keys
    model.load_state_dict(net().state_dict())


def test_the_float_model_is_back_bit_for_bit_at_full_precision() -> None:
    expected = net()(images())
    model, _ = quantize_model(net(), "W2", overrides=[Override("head", Precision(4))])
    assert not torch.equal(model(images()), expected)
    set_float(model)
    assert set(widths(model).values()) == {"float"}
    assert torch.equal(model(images()), expected)
    assert torch.equal(quantize_model(net(), "float")[0](images()), expected)


def test_the_coverage_of_each_layer_is_what_a_hand_counts() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 4), bias=False), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 2.0, -3.0, 0.1], [0.0] * 4]).view(2, 1, 1, 4))
    _, (layer,) = quantize_model(model, "W3")  # s = 2: 4, 2, -4 (a tie goes up), 0; and zeros
    error = (1 + 0.1**2) / (16 + 4 + 9 + 0.1**2)
    assert (layer.name, layer.kind, layer.shape, layer.weights) == ("0", "conv2d", (2, 1, 1, 4), 8)
    assert (layer.bits, layer.format, layer.solver, layer.granularity) == (3, "lbw", "exact", "per_channel")
    assert (layer.symbols, layer.zeros, layer.reason) == (4, 5 / 8, None)
    assert layer.squared_error == pytest.approx(error, rel=1e-6)


def test_a_layer_of_zeros_has_no_error() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    _, (layer,) = quantize_model(model)
    assert (layer.symbols, layer.zeros, layer.squared_error) == (1, 1.0, 0.0)


def test_the_coverage_names_every_weighted_layer_in_the_models_order_and_why_one_is_float() -> None:
    model, report = quantize_model(net(), keep_float=["st*"])
    assert {r.name: r.reason for r in report} == {
        "stem": "keep_float 'st*'",
        "block.conv": None,
        "block.odd": "type OddConv has no quantized twin",
        "up": "type ConvTranspose2d has no quantized twin",
        "head": None,
    }
    set_precision(model, {"head": FLOAT})
    reasons = {r.name: r.reason for r in coverage(model)}
    assert (reasons["head"], reasons["stem"]) == ("its precision is float now", "not converted")


def test_the_summary_counts_layers_and_weights_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = quantize_model(net())
    expected = (  # 3 * 4 * 9 + 4 * 2 * 9 + 4 * 5 of these and 16 + 64 more
        "converted 3/5 layers, 200 of 280 weights\n"
        "  float: block.odd (type OddConv has no quantized twin)\n"
        "  float: up (type ConvTranspose2d has no quantized twin)"
    )
    assert coverage_summary(report) == expected
    assert capsys.readouterr().out == expected + "\n"


def test_the_coverage_goes_through_json() -> None:
    _, report = quantize_model(net())
    plain = json.loads(json.dumps(coverage_json(report)))
    assert [entry["name"] for entry in plain] == [r.name for r in report]
    assert plain[0]["shape"] == [4, 3, 3, 3]


def test_the_last_matching_override_wins_for_width_and_format_each() -> None:
    overrides = [
        Override("*", Precision(6), WeightFormat("uniform")),
        Override("block.*", Precision(3)),
        Override("head", weight=WeightFormat("lbw", {"solver": "semi"})),
    ]
    model, _ = quantize_model(net(), "W2", overrides=overrides)
    assert widths(model) == {"stem": "W6", "block.conv": "W3", "head": "W6"}
    assert isinstance(model.block.conv.weight_quantizer, UniformWeight)
    assert isinstance(model.head.weight_quantizer, LbwWeight)
    assert model.head.weight_quantizer.solver == "semi"


def test_an_override_with_a_width_is_left_alone_by_the_schedule_and_one_without_is_not() -> None:
    overrides = [Override("stem", Precision(6)), Override("head", weight=WeightFormat("uniform"))]
    model, _ = quantize_model(net(), "W4", overrides=overrides)
    assert scheduled_layers(model) == ["block.conv", "head"]
    set_scheduled_precision(model, "W2")
    assert widths(model) == {"stem": "W6", "block.conv": "W2", "head": "W2"}


def test_an_override_may_fix_a_layer_at_float() -> None:
    model, _ = quantize_model(net(), "W4", overrides=[Override("head", FLOAT)])
    set_scheduled_precision(model, "W2")
    assert widths(model) == {"stem": "W2", "block.conv": "W2", "head": "float"}


def test_keep_float_wins_over_overrides() -> None:
    model, _ = quantize_model(net(), keep_float=["head"], overrides=[Override("head", Precision(4))])
    assert type(model.head) is nn.Linear


def test_the_models_format_and_its_options_reach_every_layer() -> None:
    options = {"solver": "semi", "granularity": "per_tensor", "ratio": 0.6}
    model, report = quantize_model(net(), "W3", WeightFormat("lbw", options))
    quantizers = [layer.weight_quantizer for layer in quantized_layers(model).values()]
    assert [(q.solver, q.granularity, q.ratio) for q in quantizers] == [("semi", "per_tensor", 0.6)] * 3
    assert {(r.solver, r.granularity) for r in report if r.bits} == {("semi", "per_tensor")}


@pytest.mark.parametrize("where", ["keep_float", "overrides"])
def test_a_pattern_that_matches_nothing_is_an_error_that_knows_better(where: str) -> None:
    patterns = (
        {"keep_float": ["blok.conv*"]} if where == "keep_float" else {"overrides": [Override("blok.conv*")]}
    )
    with pytest.raises(UserError) as error:
        quantize_model(net(), **patterns)
    assert str(error.value) == (
        f"{where}: pattern 'blok.conv*' matches none of the 3 layers; closest: 'block.conv'"
    )


@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("blocks.*", "block.*"),
        ("stem.*", "stem"),
        ("block.conf", "block.conv"),
        ("block.con1*", "block.conv"),
    ],
)
def test_the_closest_of_a_pattern_is_a_layer_or_a_group_of_layers(pattern: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"matches none of the 3 layers; closest: {re.escape(repr(hint))}$"):
        quantize_model(net(), keep_float=[pattern])


def test_a_model_that_is_a_layer_itself_is_refused() -> None:
    with pytest.raises(UserError) as error:
        quantize_model(nn.Conv2d(3, 4, 3))
    assert str(error.value) == (
        "model: layers must be inside it, got a bare Conv2d; wrap it in nn.Sequential"
    )


def test_a_model_with_nothing_to_swap_is_refused() -> None:
    with pytest.raises(UserError) as error:
        quantize_model(nn.Sequential(nn.ReLU()))
    assert str(error.value) == (
        "model: must have float nn.Conv2d or nn.Linear, got none in Sequential; give a float model"
    )


def test_a_model_that_is_converted_already_is_refused() -> None:
    model, _ = quantize_model(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError) as error:
        quantize_model(model)
    assert str(error.value) == (
        "model: must have layers to convert, got a Sequential that is already converted; "
        "use lbdet.set_precision"
    )


def test_a_second_conversion_leaves_the_layers_of_the_first_alone() -> None:
    model, _ = quantize_model(net(), "W2", keep_float=["head"])
    stem = model.stem
    quantize_model(model, "W8", WeightFormat("uniform"))
    assert model.stem is stem
    assert widths(model) == {"stem": "W2", "block.conv": "W2", "head": "W8"}


def test_a_width_in_an_override_may_be_text() -> None:
    model, _ = quantize_model(net(), "W4", overrides=[Override("head", "W2"), Override("stem", "float")])
    assert widths(model) == {"stem": "float", "block.conv": "W4", "head": "W2"}
    assert scheduled_layers(model) == ["block.conv"]


def nan_in_the_head() -> Net:
    model = net()
    nn.init.constant_(model.head.weight, math.nan)
    return model


@pytest.mark.parametrize(
    "model, arguments, error",
    [
        (net(), {"precision": "W4", "overrides": [Override("head", Precision(8))]}, UserError),
        (net(), {"precision": "W4", "overrides": [Override("head", "W4 A4")]}, UserError),
        (net(), {"precision": "W4", "overrides": [Override("head", weight=WeightFormat("x"))]}, UserError),
        (net(), {"precision": "W9"}, UserError),
        (net(), {"precision": 4}, UserError),
        (nan_in_the_head(), {"precision": "W4", "weight": WeightFormat("uniform")}, NumericsError),
    ],
    ids=["width", "text", "format", "default width", "number", "weight"],
)
def test_an_error_leaves_the_whole_model_float(
    model: Net, arguments: dict[str, Any], error: type[Exception]
) -> None:
    modules = list(model.modules())
    with pytest.raises(error):
        quantize_model(model, **arguments)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    nn.init.ones_(model.head.weight)
    assert len(quantized_layers(quantize_model(model, "W4")[0])) == 3


@torch.no_grad()
def test_a_transformers_linear_layers_stay_float_as_its_fused_path_would_not_call_their_twins() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, report = quantize_model(nn.Sequential(nn.Linear(4, 8), layer).eval(), "W2")
    x = torch.rand(2, 3, 4)
    with torch.enable_grad():
        expected = model(x)
    torch.testing.assert_close(model(x), expected)
    reason = "TransformerEncoderLayer reads its weight directly"
    assert {r.name: (r.bits, r.reason) for r in report} == {
        "0": (2, None),
        "1.self_attn.out_proj": (None, "type NonDynamicallyQuantizableLinear has no quantized twin"),
        "1.linear1": (None, reason),
        "1.linear2": (None, reason),
    }


def test_patterns_may_name_layers_that_stay_float_anyway() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    _, report = quantize_model(nn.Sequential(nn.Linear(4, 8), layer), "W2", keep_float=["1.linear1"])
    assert {r.name: r.reason for r in report}["1.linear1"] == "keep_float '1.linear1'"


def test_a_hook_of_loading_goes_with_the_twin() -> None:
    model, loaded = nn.Sequential(nn.Conv2d(1, 1, 1)), []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: loaded.append(module))
    state = quantize_model(model)[0].state_dict()
    gc.collect()
    model.load_state_dict(state)
    assert loaded == [model[0]]
    assert isinstance(model[0], QuantConv2d)


def test_so_do_those_of_a_swin_transformers_attention() -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

    attention = ShiftedWindowAttentionV2(8, [2, 2], [0, 0], 2)
    _, report = quantize_model(nn.Sequential(attention))
    assert {r.name: r.bits for r in report} == {
        "0.qkv": None, "0.proj": None, "0.cpb_mlp.0": 4, "0.cpb_mlp.2": 4,
    }  # fmt: skip


def test_a_layer_whose_forward_was_replaced_stays_float() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].forward = model[0].forward
    _, report = quantize_model(model)
    assert [(r.bits, r.reason) for r in report] == [(None, "its forward was replaced"), (4, None)]


def test_a_layer_used_under_two_names_is_swapped_once_and_everywhere() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {"a": nn.Sequential(shared, nn.ReLU()), "b": shared, "c": nn.Sequential(nn.ReLU(), shared)}
    )
    _, report = quantize_model(model, "W4")
    assert model["a"][0] is model["b"] is model["c"][1]
    assert isinstance(model["b"], QuantLinear)
    assert [(r.name, r.bits) for r in report] == [("a.0", 4)]
    assert coverage_summary(report) == "converted 1/1 layers, 16 of 16 weights"
    assert model_bytes(model) == 4 * 4 + 4 * 2 + 4  # bias, 16 codes as 4 groups of 5 in 16 bits, 4 scales


def test_set_precision_changes_only_the_named_layers() -> None:
    model, _ = quantize_model(net(), "W4")
    set_precision(model, {"head": Precision(2)})
    assert widths(model) == {"stem": "W4", "block.conv": "W4", "head": "W2"}


def test_set_precision_reads_text_and_finds_a_shared_layer_by_each_of_its_names() -> None:
    shared = nn.Linear(4, 4)
    model, _ = quantize_model(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)}))
    set_precision(model, {"b": "W2", "c": Precision(3)})
    assert widths(model) == {"a": "W2", "c": "W3"}


@pytest.mark.parametrize("refused", [{"head": "W8"}, {"head": 2}, {"stm": "W2"}])
def test_set_precision_changes_no_layer_where_it_refuses_one(refused: dict[str, Any]) -> None:
    model, _ = quantize_model(net(), "W4")
    with pytest.raises(UserError):
        set_precision(model, {"stem": "W2"} | refused)
    assert set(widths(model).values()) == {"W4"}


def test_set_precision_changes_no_layer_where_a_weight_is_not_finite() -> None:
    model, _ = quantize_model(nan_in_the_head(), "float", WeightFormat("uniform"))
    with pytest.raises(NumericsError):
        set_scheduled_precision(model, "W4")
    assert set(widths(model).values()) == {"float"}


@pytest.mark.parametrize(
    "name, hint",
    [("block.conf", "; closest: 'block.conv'"), ("block.odd", "; closest: 'block.conv'"), ("xyz", "")],
)
def test_set_precision_of_an_unknown_name_is_an_error(name: str, hint: str) -> None:
    model, _ = quantize_model(net())
    with pytest.raises(UserError) as error:
        set_precision(model, {name: Precision(4)})
    assert str(error.value) == f"set_precision: {name!r} is no quantized layer{hint}"


@pytest.mark.parametrize(
    "quantizer, inputs, precision, text",
    [
        (
            LbwWeight(),
            UniformActivation(),
            "W1A8",
            "x: format 'lbw' has no 1-bit weights, got W1A8; it has W2 to W6",
        ),
        (
            LbwWeight(),
            UniformActivation(),
            "W7",
            "x: format 'lbw' has no 7-bit weights, got W7; it has W2 to W6",
        ),
        (
            UniformWeight(),
            UniformActivation(),
            "W9",
            "x: format 'uniform' has no 9-bit weights, got W9; it has W2 to W8",
        ),
        (
            LbwWeight(),
            UniformActivation(),
            "W4A9",
            "x: format 'uniform' has no 9-bit activations, got W4A9; it has A1 to A8",
        ),
        (
            LbwWeight(),
            BinaryActivation(),
            "W4A2",
            "x: format 'binary' has no 2-bit activations, got W4A2; it has A1",
        ),
    ],
)
def test_a_width_that_the_format_does_not_have_is_refused(
    quantizer: WeightQuantizer, inputs: ActivationQuantizer, precision: str, text: str
) -> None:
    with pytest.raises(UserError) as error:
        check_width(quantizer, inputs, Precision.parse(precision), "x")
    assert str(error.value) == text
    check_width(quantizer, inputs, FLOAT, "x")
    check_width(quantizer, inputs, Precision(6), "x")


def test_a_refused_width_names_the_layer() -> None:
    with pytest.raises(
        UserError, match=r"^stem: format 'lbw' has no 8-bit weights, got W8; it has W2 to W6$"
    ):
        quantize_model(net(), "W8")
    with pytest.raises(UserError, match=r"^head: format 'lbw' has no 8-bit weights"):
        quantize_model(net(), "W4", overrides=[Override("head", Precision(8))])


def test_an_unknown_format_or_option_is_refused() -> None:
    with pytest.raises(UserError) as error:
        quantize_model(net(), weight=WeightFormat("lwb"))
    assert str(error.value) == (
        "format 'lwb' is unknown; formats of weights: lbw, uniform, dorefa, binary, learned_levels"
    )
    with pytest.raises(UserError, match=r"format 'uniform': .*unexpected keyword argument 'solver'"):
        WeightFormat("uniform", {"solver": "exact"}).build()


@pytest.mark.parametrize(
    "precision, weight, expected",
    [
        ("float", None, 4 * 280),
        # stem 108, conv 72, head 20 weights; 4 + 4 + 5 channels; odd and up stay float
        ("W2", None, 4 * 80 + (22 * 8 + 15 * 8 + 4 * 8) // 8 + 13),
        ("W4", None, 4 * 80 + (22 * 16 + 15 * 16 + 4 * 16) // 8 + 13),
        (
            "W6",
            WeightFormat("lbw", {"granularity": "per_tensor"}),
            4 * 80 + -(-(9 * 61 + 6 * 61 + 2 * 61) // 8) + 3,
        ),
        ("W8", WeightFormat("uniform"), 4 * 80 + 200 + 13 * 4),
    ],
)
def test_model_bytes_are_those_counted_by_hand(
    precision: str, weight: WeightFormat | None, expected: int
) -> None:
    model, _ = quantize_model(net(), precision, weight)
    biases, batch_norm = 4 * (4 + 4 + 5), 4 * 4 * 4 + 8  # 8: the int64 count of batches
    assert model_bytes(model) == expected + biases + batch_norm


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow if n in HEAVY else ()) for n in MODELS]
)
def detector(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    size = 64 if request.param.startswith("fasterrcnn") else None
    model = build_detector(request.param, ("circle", "square"), image_size=size).eval()
    images = list(torch.rand(4, 3, 64, 80))
    recalibrate_bn(model, [images])  # else an untrained SSDlite has the output 0, whatever its weights are
    return model


@torch.no_grad()
def test_a_converted_detector_at_full_precision_is_the_original_bit_for_bit(detector: nn.Module) -> None:
    image = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(2))
    (expected,) = detector([image])
    keys = list(detector.state_dict())
    weighted = [m for m in detector.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    quantize_model(detector, "W2")
    (rounded,) = detector([image])
    set_float(detector)
    (found,) = detector([image])
    assert len(expected["scores"]) > 0
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(rounded["scores"], expected["scores"])
    assert list(detector.state_dict()) == keys
    assert len(quantized_layers(detector)) == len(weighted)


@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].weight])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_coverage_counts_the_weights_of_each_level(format, bits):
    if bits not in FORMATS[format].weight.widths:
        pytest.skip(f"{format} has no {bits}-bit weights")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))
    model, report = quantize_model(model, Precision(bits), WeightFormat(format))
    for layer, found in zip(model, report, strict=True):
        quantized = layer.weight_quantizer.quantize(layer.weight, bits)
        levels = quantized.levels.view(-1, quantized.levels.shape[-1])
        assert sum(found.counts) == found.weights
        assert found.levels == tuple(levels.mean(0).tolist())
        assert found.symbols == len(set(quantized.codes.flatten().tolist()))
        assert found.stored_bits == layer.weight_quantizer.stored_bits(layer.weight, bits)
        order = quantized.dequantize().flatten()[quantized.level_index.flatten().argsort()]
        if levels.shape[0] == 1 and layer.weight_quantizer.granularity == "per_tensor":
            assert torch.equal(order, order.sort().values)
        signs = quantized.dequantize().sign().flatten()
        if format in ("lbw", "dorefa", "binary"):
            assert torch.equal(signs, levels[0][quantized.level_index.flatten()].sign())


def small(precision: str = "W2", name: str = "lbw") -> nn.Module:
    """Two convolutions."""
    torch.manual_seed(0)
    model, _ = quantize_model(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)), precision, WeightFormat(name)
    )
    return model.eval()


@torch.no_grad()
def test_held_weights_are_the_quantized_ones_and_are_quantized_once(monkeypatch):
    model = small()
    x, calls = torch.rand(1, 3, 8, 8), []
    forward = LbwWeight.forward
    monkeypatch.setattr(LbwWeight, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    expected = model(x)
    calls.clear()
    with hold_weights(model):
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert len(calls) == 2


def _replace(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(-model[0].weight)


BEHIND_ITS_BACK = {
    "in place": lambda model: model[0].weight.mul_(-1),
    "another parameter": _replace,
    "another width": lambda model: set_scheduled_precision(model, "W4"),
    "weights are loaded": lambda model: model.load_state_dict(small("W2", "uniform").half().state_dict()),
    "weights take their place": lambda model: model.load_state_dict(
        {name: -value for name, value in model.state_dict().items()}, assign=True
    ),
    "a scale": lambda model: next(model[0].weight_quantizer.parameters()).add_(0.3),
    "an optimizer": lambda model: torch.optim.SGD([model[0].weight], lr=0.1, foreach=True).step(),
}


@pytest.mark.parametrize("change", BEHIND_ITS_BACK)
@torch.no_grad()
def test_held_weights_are_never_stale(change):
    model, x = small("W2", "uniform"), torch.rand(1, 3, 8, 8)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = model(x)
    with hold_weights(model):
        BEHIND_ITS_BACK[change](model)
        found = model(x)
    assert torch.equal(found, model(x))
    assert not torch.equal(found, before)


def test_weights_that_torch_does_not_watch_are_not_held():
    with torch.inference_mode():
        model, x = small(), torch.rand(1, 3, 8, 8)
        before = model(x)
        with hold_weights(model):
            model[0].weight.mul_(-1)
            assert not torch.equal(model(x), before)


def test_held_weights_do_not_hide_a_gradient():
    model = small()
    with hold_weights(model):
        model(torch.rand(1, 3, 8, 8)).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_a_layer_used_several_times_in_a_held_pass_is_quantized_once_with_the_same_gradient(monkeypatch):
    x, calls, gradients = [torch.rand(1, 3, size, size) for size in (9, 7, 5)], [], []
    forward = UniformWeight.forward
    monkeypatch.setattr(UniformWeight, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    for hold in (lambda model: nullcontext(), hold_weights):
        model = small("W2", "uniform")
        calls.clear()
        with hold(model):
            torch.stack([model(values).square().mean() for values in x]).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(calls) == 2
    for plain, held in zip(*gradients, strict=True):
        torch.testing.assert_close(held, plain, rtol=1e-5, atol=1e-7)


def test_a_held_weight_with_a_gradient_is_not_stale_after_an_update():
    model, x = small("W2", "uniform"), torch.rand(1, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with hold_weights(model):
        before = model(x)
        before.sum().backward()
        optimizer.step()
        found = model(x)
    assert torch.equal(found, model(x))
    assert not torch.equal(found, before)


def test_weights_are_not_held_after_an_error():
    model, _ = quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)), "W2")
    with torch.no_grad():
        model[1].weight[0] = math.nan
    with pytest.raises(NumericsError), hold_weights(model):
        pass
    assert all(layer.held_weight is None for layer in quantized_layers(model).values())
