"""From a quantized model to a file that an engine runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lbdet.convert import check_width, quantized_layers, set_precision
from lbdet.deploy.graph import ClassifierGraph, detection_graph
from lbdet.deploy.lower import lower
from lbdet.deploy.onnx_export import export_onnx
from lbdet.deploy.openvino_export import export_openvino
from lbdet.engine.finish import calibrate
from lbdet.engine.task import MEAN, STD, Task
from lbdet.errors import UserError
from lbdet.files import write_atomically
from lbdet.precision import Precision

DETECTION_OUTPUTS = ("boxes", "labels", "scores")
ACT_BITS = 8


def quantize_inputs(model: nn.Module, task: Task, train: Any, images: int) -> None:
    """Give the layers that have weight bits alone 8-bit inputs, calibrated on training images; in place.

    Raises:
        UserError: there is no such layer, or its format has no 8-bit inputs.
    """
    layers = quantized_layers(model)
    wanted = {
        name: Precision(layer.precision.weight_bits, ACT_BITS)
        for name, layer in layers.items()
        if layer.precision.weight_bits is not None and layer.precision.act_bits is None
    }
    if not wanted:
        raise UserError(
            "--calibration-images: is for runs of weight bits without activation bits, got none such layer; "
            "leave it out"
        )
    for name, precision in wanted.items():
        check_width(layers[name].weight_quantizer, layers[name].activation_quantizer, precision, name)
    set_precision(model, wanted)
    calibrate(model, task, train, images, names=wanted)


def trace(model: nn.Module, path: Path, facts: Mapping[str, Any], float_weights: bool = False) -> None:
    """Write a quantized model as an ONNX file.

    Args:
        model: a detector or classifier with calibrated activations; not changed.
        path: of the file.
        facts: what it carries, see `lbdet.deploy.certify.describe`: at least `task`, `classes`, and of a
            classifier `image_size`, the side of its input.
        float_weights: see `lbdet.deploy.lower.lower`.

    Raises:
        UserError: a layer that cannot be exported.
    """
    lowered = lower(model, float_weights)
    if facts["task"] == "detection":
        graph, outputs = detection_graph(lowered), DETECTION_OUTPUTS
        example = torch.zeros(240, 320, 3, dtype=torch.uint8)
    else:
        graph, outputs = ClassifierGraph(lowered, MEAN, STD), ("scores",)
        example = torch.zeros(facts["image_size"], facts["image_size"], 3, dtype=torch.uint8)
    export_onnx(graph, example, outputs, path, {"image_size": None, "short_side": None, **facts})


def place(source: Path, path: Path) -> None:
    """Write an ONNX file to its place: as it is, or for a path that ends in `.xml` as an OpenVINO model.

    Raises:
        UserError: it cannot be written.
    """
    if path.suffix == ".xml":
        export_openvino(source, path)
    else:
        write_atomically(path, partial(shutil.copyfile, source))
