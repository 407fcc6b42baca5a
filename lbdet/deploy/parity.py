"""Does the exported file find what the trained model finds, and does the engine compute in int8?

Three comparisons on real images, of the engine against torch at the same widths:

    metrics     mAP (or top-1) of both on the same images
    detections  of scores of at least 0.3: pairs of one class that overlap, their scores and boxes; lost; new
    layers      the uint8 codes of each layer's input: the share that differs, and by how much

Codes differ without anything being wrong. Engines add floats in another order, so now and then an input in the
middle between two codes falls to the other side; behind 60 layers of 4-bit weights, that one step has become
many. How many is measured: `noise` are the same differences between the torch model and itself, on images
that are brighter by a millionth. An engine that computes what it should differs about as much.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbdet.convert import hold_weights, quantized_layers
from lbdet.data.images import read_image
from lbdet.data.records import DetectionData
from lbdet.deploy.engines import ENGINES, Engine
from lbdet.deploy.lower import InputGrid, input_grid
from lbdet.deploy.onnx_export import with_input_codes
from lbdet.deploy.openvino_export import export_openvino
from lbdet.engine.evaluate import Detections, detect, score
from lbdet.metrics import diff_detections

METRICS = ("voc07_map", "voc_area_map", "coco_map")
LOWEST_SCORE = 0.3
"""of the detections that are compared one by one"""
Codes = Mapping[str, np.ndarray]


class Brighter(nn.Module):
    """A detector or classifier that sees its input times 1 + 10^-6."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Sequence[Tensor] | Tensor) -> Any:
        if isinstance(images, Tensor):
            return self.model(images * (1 + 1e-6))
        return self.model([image * (1 + 1e-6) for image in images])


def detection_parity(
    model: nn.Module, engine: Engine, data: DetectionData, score_classes: Sequence[str] | None
) -> dict[str, Any]:
    """Compare a detector in torch with its exported file, image by image.

    Args:
        model: as it was exported.
        data: the images.
        score_classes: the classes that the means are over; None = all.

    Returns:
        `images`; `torch`, `engine` and `noise`, each with the means of `METRICS`; `detections`, how those of the
        engine differ from torch's, and `noise_detections`, how torch's from themselves.
    """
    reference = detect(model, data, batch_size=1, workers=0)
    noise = detect(Brighter(model), data, batch_size=1, workers=0)
    found = [engine.run(read_image(record.path)) for record in data.records]
    results = {"torch": reference, "engine": found, "noise": noise}
    means = {name: score(detections, data, score_classes) for name, detections in results.items()}
    return {
        "images": len(data),
        **{name: {key: values[key] for key in METRICS} for name, values in means.items()},
        "detections": detection_differences(reference, found),
        "noise_detections": detection_differences(reference, noise),
    }
