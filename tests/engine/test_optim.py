"""Which parameters decay, how large a step is, and the average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lbdet.convert import quantize_model
from lbdet.engine.optim import average_start, average_update, build_optimizer, lr_factor, parameter_groups
from lbdet.models.ssd_tiny import ssd_tiny


def test_only_weights_of_convolutions_and_linear_layers_decay():
    model, _ = quantize_model(ssd_tiny(7), "W4")
    decaying, others = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = {
        f"{n}.{p}"
        for n, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for p in ("weight", "bias")
    }
    decaying, others = ({names[id(p)] for p in group["params"]} for group in (decaying, others))
    assert decaying | others == set(names.values())
    assert not decaying & others
    assert norms <= others
    assert others - norms == {name for name in names.values() if name.endswith(".bias")} - norms
    assert all(name.endswith(".weight") for name in decaying)


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].requires_grad_(False)
    decaying, others = parameter_groups(model, 0.1)
    assert [id(p) for p in decaying["params"] + others["params"]] == [id(model[1].weight), id(model[1].bias)]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_a_gradient_decay_shrinks_weights_and_nothing_else(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = average_start(model)
    optimizer = build_optimizer(model, name, lr=0.1, weight_decay=0.5, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before["0.weight"] * 0.95)
    for key in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(model.state_dict()[key], before[key])


def test_the_momentum_of_sgd_is_the_one_asked_for():
    optimizer = build_optimizer(nn.Linear(2, 2), "sgd", lr=0.1, weight_decay=0.0, momentum=0.7)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


@pytest.mark.parametrize(
    ("step", "warmup", "curve", "expected"),
    [
        (0, 0, "cosine", 1.0),
        (50, 0, "cosine", 0.5),
        (25, 0, "cosine", 0.5 + math.sqrt(0.125)),
        (99, 0, "cosine", 0.5 * (1 + math.cos(0.99 * math.pi))),
        (0, 4, "steps", 0.25),
        (3, 4, "steps", 1.0),
        (4, 4, "steps", 1.0),
        (59, 0, "steps", 1.0),
        (60, 0, "steps", 0.1),
        (89, 0, "steps", 0.1),
        (90, 0, "steps", 0.01),
        (1, 4, "cosine", 0.5 * 0.5 * (1 + math.cos(0.01 * math.pi))),
    ],
)
def test_the_learning_rate_follows_its_curve(step, warmup, curve, expected):
    assert lr_factor(step, 100, warmup, curve, (0.6, 0.9)) == pytest.approx(expected)


def test_the_cosine_only_falls_and_never_reaches_zero():
    rates = [lr_factor(step, 30, 0, "cosine") for step in range(30)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_the_average_follows_its_formula():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = average_start(model)
    expected = {key: value.double() for key, value in average.items()}
    for step in range(30):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.ones_like(tensor) * (step + 1))
        average_update(average, model, 0.6, step)
        decay = min(0.6, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
    for key, value in average.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=0)
    assert average["1.num_batches_tracked"] == model[1].num_batches_tracked == 30 * 31 // 2


def test_the_start_of_an_average_is_a_copy():
    model = nn.Linear(2, 2)
    average = average_start(model)
    before = average["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(average["weight"], before)
    assert not average["weight"].requires_grad
