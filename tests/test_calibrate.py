"""Ranges of activations: from data, in any order, and what the model is left with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lbdet.convert import (
    ActivationFormat,
    Override,
    WeightFormat,
    calibrate_activations,
    quantize_model,
    quantized_layers,
    set_scheduled_precision,
    uncalibrated,
)
from lbdet.errors import NumericsError, UserError
from lbdet.nn import QuantConv2d
from lbdet.precision import Precision
from lbdet.quant.activations import direct_range


def net() -> nn.Sequential:
    """A two-sided input, a one-sided one behind a ReLU, a two-sided one behind a Hardswish."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ranges(model: nn.Module, bits: int) -> dict[str, tuple[float, int, int] | None]:
    return {n: layer.activation_quantizer.range(bits) for n, layer in quantized_layers(model).items()}


@pytest.mark.parametrize("objective", ["mse", "channel_aware"])
def test_order_and_cut_of_the_batches_make_no_difference(objective: str) -> None:
    found = []
    x = images()
    for batches in (x.split(12), x.split(4), x[torch.randperm(12)].split(5)):
        model, _ = quantize_model(
            net().eval(), "W4A4", activation=ActivationFormat(options={"objective": objective})
        )
        assert calibrate_activations(model, lambda batches=batches: batches) == 12
        found.append(ranges(model, 4))
    for other in found[1:]:
        for name, range_ in found[0].items():
            assert other[name] == pytest.approx(range_, rel=1e-4)


def test_a_range_is_that_of_the_inputs_with_float_activations_and_present_weights() -> None:
    model, _ = quantize_model(net().eval(), "W2A4")
    calibrate_activations(model, lambda: [images()])
    inputs: dict[str, Tensor] = {}
    set_scheduled_precision(model, "W2")
    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0]))
    model(images())
    for name, layer in quantized_layers(model).items():
        scale, low = direct_range(inputs[name], 4, "mse", layer.channel_dim)
        assert layer.activation_quantizer.range(4) == pytest.approx((scale, low, low + 15), rel=1e-5)
    lows = {name: range_[1] for name, range_ in ranges(model, 4).items() if range_}
    assert lows["0"] < -5  # images
    assert lows["3"] == 0  # behind the ReLU
    assert lows["8"] < 0  # behind the Hardswish


def test_the_model_is_left_as_it_was_but_for_its_ranges() -> None:
    model, _ = quantize_model(
        net(), "W4A8", overrides=[Override("8", Precision(8, 2), WeightFormat("uniform"))]
    )
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    widths = {name: layer.precision for name, layer in quantized_layers(model).items()}
    assert uncalibrated(model) == ["0", "3", "8"]
    calibrate_activations(model, lambda: [images()])
    assert uncalibrated(model) == []
    assert [module.training for module in model.modules()] == modes
    assert {name: layer.precision for name, layer in quantized_layers(model).items()} == widths
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {
        f"{name}.activation_quantizer.{what}_{bits}"
        for name, bits in (("0", 8), ("3", 8), ("8", 2))
        for what in ("log_scale", "low")
    }
    assert all(not layer._forward_pre_hooks for layer in quantized_layers(model).values())


def test_statistics_of_the_batch_make_the_scale_of_the_weights_irrelevant() -> None:
    found = []
    for factor in (1.0, 64.0):
        model = net()
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[0].bias.mul_(factor)
        quantize_model(model, "W4A4")
        running = model[1].running_var.clone()
        calibrate_activations(model, lambda: [images()], use_batch_statistics=True)
        assert torch.equal(model[1].running_var, running)
        assert model[1].track_running_stats
        assert model[1].num_batches_tracked == 0
        found.append(ranges(model, 4)["3"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_model_without_act_bits_reads_no_image() -> None:
    def fail() -> list[Tensor]:
        raise AssertionError

    model, _ = quantize_model(net(), "W4")
    assert calibrate_activations(model, fail) == 0


def test_batches_that_are_not_the_same_at_each_call_are_refused() -> None:
    model, _ = quantize_model(net(), "W4A8")
    spent = iter([images(2)])
    for batches, text in (
        (
            lambda: spent,
            "must give the same images at each call, got 2 then 0; start from the first one at each",
        ),
        (lambda: [], "must give images, got none; give some that the model is for"),
        ([images(2)], "must be a function that returns them, got list; write lambda: images"),
    ):
        with pytest.raises(UserError) as error:
            calibrate_activations(model, batches)  # type: ignore[arg-type]
        assert str(error.value) == f"batches: {text}"
        assert uncalibrated(model) == ["0", "3", "8"]
        assert all(layer.precision == Precision(4, 8) for layer in quantized_layers(model).values())


def test_a_forward_pass_before_calibration_is_refused() -> None:
    model, _ = quantize_model(net(), "W4A8")
    with pytest.raises(
        UserError, match=r"^8-bit activations are not calibrated; call lbdet.calibrate_activat"
    ):
        model(images())


def test_inputs_that_are_not_finite_are_an_error_and_leave_the_widths() -> None:
    model, _ = quantize_model(net(), "W4A8")
    x = images()
    x[0, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError):
        calibrate_activations(model, lambda: [x])
    assert all(layer.precision == Precision(4, 8) for layer in quantized_layers(model).values())


def test_learned_clips_start_from_the_positive_side_and_the_loss_of_the_other_is_told(caplog) -> None:
    caplog.set_level("INFO")
    model, _ = quantize_model(
        net().eval(), "W4A4", WeightFormat("dorefa"), ActivationFormat("dorefa", {"clip": "learned"})
    )
    calibrate_activations(model, lambda: [images()])
    assert "2 layers have negative inputs, which become 0: 0, ..." in caplog.text
    scale, low, high = model[0].activation_quantizer.range(4)
    assert (low, high) == (0, 15)
    assert scale == pytest.approx(direct_range(images().clamp_min(0), 4, "mse", -3)[0], rel=1e-6)


def test_eight_bits_hardly_change_the_output_and_padding_stays_zero() -> None:
    model = net().eval()
    expected = model(images())
    quantize_model(model, "W8A8", WeightFormat("uniform"))
    calibrate_activations(model, lambda: [images()])
    assert (model(images()) - expected).abs().max() < 0.03 * expected.abs().max()
    layer = model[3]
    assert isinstance(layer, QuantConv2d)
    assert layer.activation_quantizer(torch.zeros(1, 8, 2, 2), 8, -3).eq(0).all()
