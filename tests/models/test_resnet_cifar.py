"""The network of the paper: its size, its shapes, its shortcuts without weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lbdet.models.resnet_cifar import BasicBlock, resnet20_cifar


def test_it_has_the_parameters_of_the_paper_0_27_million_none_in_a_shortcut() -> None:
    model = resnet20_cifar(10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(p.numel() for p in resnet20_cifar(100).parameters()) == 269_722 + 90 * 65
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(3, 3)] * 19


def test_its_keys_are_those_that_torchvision_would_use() -> None:
    keys = list(resnet20_cifar(10).state_dict())
    assert {key.split(".")[0] for key in keys} == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}
    assert {"conv1.weight", "layer2.0.conv2.weight", "layer3.2.bn1.running_var", "fc.bias"} <= set(keys)


def test_the_stages_have_the_channels_and_sizes_of_the_paper() -> None:
    model, shapes = resnet20_cifar(10).eval(), {}
    for name in ("conv1", "layer1", "layer2", "layer3", "avgpool", "fc"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _x, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32))
    assert shapes == {
        "conv1": (16, 32, 32),
        "layer1": (16, 32, 32),
        "layer2": (32, 16, 16),
        "layer3": (64, 8, 8),
        "avgpool": (64, 1, 1),
        "fc": (10,),
    }


@pytest.mark.parametrize("stride, channels", [(1, 4), (2, 8)])
def test_a_block_whose_convolutions_give_nothing_is_its_shortcut(stride: int, channels: int) -> None:
    """Written out pixel by pixel: every second one, then channels of zeros."""
    block = BasicBlock(4, channels, stride).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 7, 6)
    with torch.no_grad():
        out = block(x)
    height, width = -(-7 // stride), 6 // stride
    assert out.shape == (2, channels, height, width)
    for n in range(2):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    expected = x[n, c, i * stride, j * stride] if c < 4 else 0.0
                    assert out[n, c, i, j] == expected


def test_its_signal_neither_dies_nor_explodes_and_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = resnet20_cifar(10).train()
    logits = model(torch.randn(16, 3, 32, 32))
    assert 0.05 < logits.std() < 20
    nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())
