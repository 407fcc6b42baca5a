"""What a phase change does: what changes its width starts anew, the rest keeps what it has learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lbdet.convert import (
    ActivationFormat,
    Override,
    WeightFormat,
    quantize_model,
    quantized_layers,
    set_scheduled_precision,
)  # fmt: skip
from lbdet.engine.phases import PhaseChange, enter_phase
from lbdet.precision import Plan, Precision


def model(activation: ActivationFormat | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    own = [Override("4", Precision(8, 8))]
    net, _ = quantize_model(net, "W2A2", WeightFormat("uniform"), activation, own)
    for precision in ("W4A4", "W4", "W2A4", "W2A2"):
        set_scheduled_precision(net, precision)
    return net


def plan(text: str, phase: int = 0) -> Plan:
    target = dict.fromkeys(["0", "2"], Precision.parse(text))
    return Plan(target, target, phase, range(1))


def enter(net: nn.Module, before: str | None, now: str, **change) -> list[str]:
    """Enter a phase; the ranges that it asks for become `scale 1, codes from 0`."""
    asked: list[str] = []

    def calibrate(names) -> None:
        asked.extend(names)
        for name in names:
            layer = quantized_layers(net)[name]
            if layer.precision.act_bits:
                layer.activation_quantizer.set_range(layer.precision.act_bits, 1.0, 0)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    enter_phase(
        net, plan(before) if before else None, plan(now, 1), PhaseChange(**change), optimizer, calibrate
    )
    return asked


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(before: dict[str, Tensor], net: nn.Module) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def drift(net: nn.Module) -> None:
    """Move every learned parameter, as training would."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "log_scale" in name:
                parameter.add_(0.5)


def test_the_first_phase_starts_every_layer_those_with_a_width_of_their_own_too() -> None:
    net = model()
    assert enter(net, None, "W4A4") == ["0", "2", "4"]
    assert {n: str(x.precision) for n, x in quantized_layers(net).items()} == {
        "0": "W4A4", "2": "W4A4", "4": "W8A8"
    }  # fmt: skip


def test_where_only_inputs_get_a_width_the_learned_scales_of_weights_stay() -> None:
    net = model()
    enter(net, None, "W4")
    drift(net)
    before = state(net)
    assert enter(net, "W4", "W4A4") == ["0", "2"]
    assert changed(before, net) == {
        f"{layer}.activation_quantizer.{name}" for layer in "02" for name in ("log_scale_4", "low_4")
    }


def test_where_only_weights_change_the_learned_ranges_stay_and_weights_are_fitted_anew() -> None:
    net = model()
    enter(net, None, "W4A4")
    enter(net, "W4A4", "W2A4")
    fitted = net.state_dict()["0.weight_quantizer.log_scale_2"].clone()
    drift(net)
    before = state(net)
    assert enter(net, "W4A4", "W2A4") == []
    assert changed(before, net) == {"0.weight_quantizer.log_scale_2", "2.weight_quantizer.log_scale_2"}
    assert torch.equal(net.state_dict()["0.weight_quantizer.log_scale_2"], fitted)


@pytest.mark.parametrize("activation", [None, ActivationFormat("dorefa", {"clip": "learned"})])
def test_rescaled_ranges_clip_where_they_clipped_before(activation) -> None:
    net = model(activation)
    enter(net, None, "W4A4")
    quantizer = quantized_layers(net)["2"].activation_quantizer
    quantizer.set_range(4, 0.4, 0 if activation else -5)
    assert enter(net, "W4A4", "W2A2", ranges="rescale") == []
    found = quantizer.range(2)
    assert found is not None
    scale, low, high = found
    assert (scale, low, high) == (
        pytest.approx(0.4 * 15 / 3),
        0 if activation else -1,
        3 if activation else 2,
    )
    assert scale * (high - low) == pytest.approx(0.4 * 15)


def test_a_layer_without_a_range_before_is_calibrated_where_others_are_rescaled() -> None:
    net = model()
    enter(net, None, "W4")
    assert enter(net, "W4", "W4A4", ranges="rescale") == ["0", "2"]


@pytest.mark.parametrize("reset", [False, True])
def test_momentum_is_forgotten_on_request(reset: bool) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    for before in (None, plan("W4")):
        assert optimizer.state
        enter_phase(
            net, before, plan("W2", 1), PhaseChange(reset_momentum=reset), optimizer, lambda names: None
        )
    assert bool(optimizer.state) == (not reset)
