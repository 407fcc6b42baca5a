"""Batch norms are paired with the convolution before them if nothing else sees its output, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdet.convert import quantize_model
from lbdet.deploy.fold import batch_norm_pairs, factor_and_bias
from lbdet.models import MODELS
from lbdet.models.classifiers import CLASSIFIERS

SLOW = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet18_fpn", "resnet50", "alexnet", "ssd300_vgg16")
COUNTS = {
    "ssdlite320_mobilenet_v3_large": 70, "ssd300_vgg16": 0, "ssd_tiny": 12, "fasterrcnn_resnet18_fpn": 20,
    "fasterrcnn_resnet50_fpn": 53, "fasterrcnn_mobilenet_v3_large_320_fpn": 46, "resnet18": 20,
    "resnet50": 53, "mobilenet_v2": 52, "alexnet": 0, "resnet20_cifar": 19,
}  # fmt: skip


class Block(nn.Module):
    """A convolution and a batch norm, called in ways that a test chooses."""

    def __init__(self, call: Callable[[Block, Tensor], object]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)  # names and order tell nothing
        self.conv = nn.Conv2d(3, 3, 1)
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(self, x)


def branch(block: Block, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) if x.sum() > 0 else x


UNPAIRED: dict[str, Callable[[Block, Tensor], object]] = {
    "the output is used twice": lambda b, x: (y := b.conv(x)) + b.norm(y),
    "the output is returned too": lambda b, x: (b.norm(y := b.conv(x)), y),
    "something is between": lambda b, x: b.norm(F.relu(b.conv(x))),
    "something changes it in place": lambda b, x: b.norm(b.conv(x).add_(1)),
    "batch norm comes first": lambda b, x: b.conv(b.norm(x)),
    "only its size is read": lambda b, x: b.norm(y := b.conv(x)) * y.shape[0],
    "the convolution is called again": lambda b, x: b.norm(b.conv(b.conv(x))),
    "batch norm is called again": lambda b, x: b.norm(b.norm(b.conv(x))),
    "batch norm gets the input": lambda b, x: b.norm(x) + b.conv(x),
    "the code depends on values": branch,
    "the weight is used twice": lambda b, x: b.norm(b.conv(x)) + F.conv2d(x, b.conv.weight),
    "the statistics are read too": lambda b, x: b.norm(b.conv(x)) + b.norm.running_mean,
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_no_pair_where(name: str) -> None:
    assert batch_norm_pairs(nn.Sequential(Block(UNPAIRED[name]))) == ({}, ["0.norm"])


@pytest.mark.parametrize("call", [lambda b, x: b.norm(b.conv(x)), lambda b, x: F.relu(b.norm(b.conv(x)) + x)])
def test_a_pair_where_batch_norm_directly_follows(call: Callable[[Block, Tensor], object]) -> None:
    assert batch_norm_pairs(nn.Sequential(nn.Identity(), Block(call))) == ({"1.conv": "1.norm"}, [])


def test_a_part_with_two_names_has_no_pairs() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert batch_norm_pairs(nn.Sequential(block, block)) == ({}, ["0.1"])


def test_weights_that_two_convolutions_share_are_left_alone() -> None:
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    assert batch_norm_pairs(nn.Sequential(first, nn.BatchNorm2d(3), second)) == ({}, ["1"])


class Optional(Block):
    """Does something in between where it is asked to."""

    def forward(self, x: Tensor, between: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.norm(y if between is None else y * between)


class Asking(nn.Module):
    """Asks a part to do something in between."""

    def __init__(self, between: Tensor | None = None) -> None:
        super().__init__()
        self.part, self.between = Optional(lambda b, x: x), between

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, self.between)


def test_a_part_with_optional_arguments_is_paired_as_it_is_called_and_not_as_its_defaults_are() -> None:
    assert batch_norm_pairs(Optional(lambda b, x: x)) == ({}, ["norm"])
    assert batch_norm_pairs(Asking(torch.full((1,), 2.0))) == ({}, ["part.norm"])
    assert batch_norm_pairs(Asking()) == ({"part.conv": "part.norm"}, [])


def test_the_parts_of_one_with_optional_arguments_are_looked_at() -> None:
    model = Optional(lambda b, x: x)
    model.inner = Block(lambda b, x: b.norm(b.conv(x)))
    assert batch_norm_pairs(model) == ({"inner.conv": "inner.norm"}, ["norm"])


class OtherNorm(nn.BatchNorm2d):
    """May compute anything."""


class OtherConv(nn.Conv2d):
    """May compute anything."""


@pytest.mark.parametrize(
    "first, second",
    [
        (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        (nn.Conv2d(3, 3, 1), OtherNorm(3)),
        (OtherConv(3, 3, 1), nn.BatchNorm2d(3)),
        (nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)),
        (nn.Linear(3, 3), nn.BatchNorm1d(3)),
    ],
)
def test_other_kinds_of_layers_have_no_pairs(first: nn.Module, second: nn.Module) -> None:
    assert batch_norm_pairs(nn.Sequential(first, second)) == ({}, ["1"])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in COUNTS]
)
def test_every_batch_norm_of_every_model_has_its_convolution(name: str) -> None:
    model = (MODELS | CLASSIFIERS)[name](3)
    quantize_model(model, "float")
    before = [(module, module.training) for module in model.modules()]
    pairs, left = batch_norm_pairs(model)
    assert left == []
    assert len(pairs) == COUNTS[name]
    assert [(module, module.training) for module in model.modules()] == before
    state = model.state_dict()
    for conv, norm in pairs.items():
        assert len(state[f"{conv}.weight"]) == len(state[f"{norm}.running_mean"])


def test_the_models_are_all_looked_at() -> None:
    assert COUNTS.keys() == MODELS.keys() | CLASSIFIERS.keys()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_factor_and_bias_are_what_batch_norm_computes(bias: bool, affine: bool) -> None:
    g = torch.Generator().manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias).double(), nn.BatchNorm2d(5, affine=affine).double().eval()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.randn(5, generator=g))
    norm.running_var.copy_(torch.rand(5, generator=g))
    with torch.no_grad():
        if affine:
            norm.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]))
            norm.bias.copy_(torch.randn(5, generator=g))
        factor, shift = factor_and_bias(norm, conv.bias)
        x = torch.randn(2, 3, 6, 6, generator=g, dtype=torch.float64)
        folded = F.conv2d(x, conv.weight * factor.view(-1, 1, 1, 1), shift)
        torch.testing.assert_close(folded, norm(conv(x)), rtol=1e-12, atol=1e-12)
