"""What happens where a schedule goes on to other widths: quantizers start, optimizers may forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lbdet.convert import quantized_layers, rescale_range, set_precision, start_weights
from lbdet.precision import FLOAT, Plan


@dataclass(frozen=True)
class PhaseChange:
    """What the user may choose; the names are those of the config's `schedule.phase_change` section."""

    ranges: Literal["calibrate", "rescale"] = "calibrate"
    reset_momentum: bool = False
    restart_lr: bool = True


def enter_phase(
    model: nn.Module,
    before: Plan | None,
    plan: Plan,
    change: PhaseChange,
    optimizer: torch.optim.Optimizer,
    calibrate: Callable[[Sequence[str]], None],
) -> None:
    """Set what quantizers learn from the weights and the data of the moment, where widths change.

    What keeps its width keeps what it has learned. The model is left at the phase's target widths.

    Args:
        before: the plan of the step before; None at the first step.
        calibrate: sets the ranges of the layers that it is given.
    """
    set_precision(model, plan.target)
    now = {name: layer.precision for name, layer in quantized_layers(model).items()}
    was = now | dict(before.target) if before else dict.fromkeys(now, FLOAT)
    start_weights(model, [name for name in now if was[name].weight_bits != now[name].weight_bits])
    inputs = [name for name in now if was[name].act_bits != now[name].act_bits]
    if change.ranges == "rescale":
        inputs = [name for name in inputs if not rescale_range(model, name, was[name].act_bits)]
    calibrate(inputs)
    if before and change.reset_momentum:
        optimizer.state.clear()
