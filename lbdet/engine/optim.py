"""Which parameters decay, and how large is a step? Optimizer groups, the learning-rate curve, averages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbdet.convert import quantized_layers
from lbdet.nn import UniformActivation

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters: weights of convolutions and linear layers decay,
    everything else does not.

    Everything else is biases, batch norm and the parameters of quantizers (steps, clips, levels).
    """
    weights = {id(m.weight) for m in model.modules() if isinstance(m, _WEIGHTED)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in weights], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in weights], "weight_decay": 0.0},
    ]


def clipped_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose gradients are clipped by their common norm: all but quantizers' own.

    The gradient of a log scale is relative to the scale, so that of a channel of tiny weights would decide.
    """
    return [p for name, p in model.named_parameters() if "_quantizer." not in name]


def build_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """Make "adamw" (betas .9, .999) or "sgd" (with momentum) over `parameter_groups`."""
    groups = parameter_groups(model, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    return torch.optim.AdamW(groups, lr=lr)


def lr_factor(
    step: int, total_steps: int, warmup_steps: int, curve: str, milestones: Sequence[float] = ()
) -> float:
    """Return what the base learning rate is multiplied with at `step`, counted from 0.

    A linear warm-up times a half cosine from 1 to 0 over all steps ("cosine"), or times 1/10 for each
    milestone, a share of all steps, that has passed ("steps").

    >>> [lr_factor(step, 100, 0, "steps", [0.5]) for step in (49, 50)]
    [1.0, 0.1]
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if curve == "steps":
        return warmup * 0.1 ** sum(step >= share * total_steps for share in milestones)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def moving_statistics(model: nn.Module) -> list[Tensor]:
    """Return what a forward pass in training changes by itself: batch norm's running statistics where it is
    trained, and the scales of activations that follow the data. Not copies, detached.
    """
    found = []
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            found += [x for x in (layer.running_mean, layer.running_var) if x is not None]
    for layer in quantized_layers(model).values():
        quantizer, bits = layer.activation_quantizer, layer.precision.act_bits
        if bits is not None and isinstance(quantizer, UniformActivation) and quantizer.update == "average":
            found.append(quantizer.get_parameter(f"log_scale_{bits}").detach())
    return found


def average_start(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state, the start of an exponential moving average."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def average_update(average: Mapping[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Move `average` towards the model by 1 - decay, in place; counters are copied.

    The decay of the first steps is smaller, (1 + step) / (10 + step), so that the start is forgotten soon.

    Args:
        step: counted from 0 where the average began.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    state = model.state_dict()
    floats = [name for name, value in average.items() if value.is_floating_point()]
    for name in floats:
        average[name].lerp_(state[name], weight)
    for name in average.keys() - floats:
        average[name].copy_(state[name])
