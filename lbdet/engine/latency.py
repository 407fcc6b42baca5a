"""How long does a model take for an image? Milliseconds, one image at a time."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import nn

from lbdet.convert import hold_weights
from lbdet.data.records import spread_images
from lbdet.engine.task import Task

_WARM_UP = 2


@torch.no_grad()
def latency_ms(model: nn.Module, task: Task, data: Any, images: int = 20) -> float:
    """Return the median time of a forward pass, post-processing included, in milliseconds.

    Weights are quantized beforehand, inputs in the pass. It is float arithmetic at every width: what a
    low-bit engine would take is not measured here.

    Args:
        data: of the task's kind; `images` of them are taken at equal distances, one at a time.
    """
    model.eval()
    device = next(model.parameters()).device
    times = []
    with hold_weights(model):
        for batch in task.inputs(spread_images(data, images + _WARM_UP), 1, device):
            start = time.perf_counter()
            model(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return 1000 * median(times[_WARM_UP:] or times)
