"""A small model that is quantized in any way, and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbdet.convert import (
    ActivationFormat,
    Override,
    WeightFormat,
    calibrate_activations,
    quantize_model,
    quantized_layers,
)
from lbdet.deploy.pack import PackSummary, pack_model

CLASSES = ("cat", "größe", 'a "b"')


def float_model(seed: int = 0, channels: int = 6) -> nn.Sequential:
    """Two convolutions with batch norm, one without, a linear layer; `[N, 3, 8, 8]` -> `[N, 2]`."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, bias=False),
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give batch norms statistics, some negative gammas and one of 0."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            n = module.num_features
            module.get_buffer("running_mean").copy_(torch.randn(n, generator=g) * 0.1)
            module.get_buffer("running_var").copy_(torch.rand(n, generator=g) + 0.5)
            module.weight.copy_(torch.randn(n, generator=g).clamp(-2, 2) * 0.5 + 0.8)
            module.weight[0] = 0
            module.bias.copy_(torch.randn(n, generator=g) * 0.1)


def quantized(
    precision: str = "W4",
    form: WeightFormat | None = None,
    activation: ActivationFormat | None = None,
    overrides: tuple[Override, ...] = (),
    keep_float: tuple[str, ...] = (),
) -> nn.Sequential:
    model = float_model()
    with torch.no_grad():
        model.get_parameter("0.weight")[1] = 0
        model.get_parameter("0.weight")[2] *= 1e-3
        model.get_parameter("3.weight")[3] *= 50
    quantize_model(model, precision, form, activation, overrides, keep_float)
    if any(layer.precision.act_bits for layer in quantized_layers(model).values()):
        calibrate_activations(model, lambda: [images()])
    return model


def images(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def packed(model: nn.Module, path: Path, **options: Any) -> PackSummary:
    return pack_model(model, path, "toy", CLASSES, "W4", **options)
